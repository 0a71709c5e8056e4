// Who knows of whose accesses: vector clocks, by the rules of the PTX memory model (PTX ISA, section 8).
//
// Each thread counts. An access is (thread, count). A thread knows another's accesses up to a count: those that come
// before its own. Barriers tell all threads of a program. An atomic release tells those that acquire at its address
// later. Two accesses of one place race if one writes, not both are atomic, and neither thread knows of the other's.
#pragma once
#include <algorithm>
#include <memory>
#include <unordered_map>
#include <vector>

#include "arithmetic.h"

constexpr u32 NOBODY = ~0u;
using Counts = std::vector<u32>;  // one a thread
using Known = std::shared_ptr<const Counts>;

static Known joined(const Known& a, const Known& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  auto both = std::make_shared<Counts>(*a);
  for (size_t k = 0; k < both->size(); k++) (*both)[k] = std::max((*both)[k], (*b)[k]);
  return both;
}

struct Access {
  u32 thread = NOBODY, count = 0, site = 0;
  bool atomic = false;
};

// What is remembered of a place in memory: the last write, and the reads since. One thread reads most places, so the
// first read has a place of its own. Of a thread's others, the last plain one and the last atomic one are kept.
struct Cell {
  Access write, read;
  std::unique_ptr<std::unordered_map<u32, Access>> others;

  void add(const Access& mine) {
    if (read.thread == NOBODY || (read.thread == mine.thread && read.atomic == mine.atomic)) {
      read = mine;
      return;
    }
    if (!others) others = std::make_unique<std::unordered_map<u32, Access>>();
    (*others)[mine.thread * 2 + mine.atomic] = mine;
  }
  void written(const Access& mine) {
    write = mine, read = Access(), others.reset();
  }
};

class Cells {
 public:
  Cell& operator[](u64 key) {
    auto& page = pages_[key >> 10];
    if (page.empty()) page.resize(1024);
    return page[key & 1023];
  }
  void clear() { pages_.clear(); }

 private:
  std::unordered_map<u64, std::vector<Cell>> pages_;
};
