// A grid of GPU threads on one thread of the CPU. Each is a fiber. At every atomic access and barrier, and with some
// probability at every other access, another is chosen by a seeded generator, so that a run repeats.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <unordered_set>

#include "races.h"

enum Order { WEAK = 0, RELAXED = 1, ACQUIRE = 2, RELEASE = 4 };
enum State { READY, AT_BARRIER, IN_WARP, ENDED };
enum Meeting { EXCHANGE, LEAST, MOST, LEAST_UNSIGNED, MOST_UNSIGNED, GATHER };
constexpr size_t STACK = 64 << 10;
constexpr u32 WARP = 32;
// Generic addresses: shared memory and the parameters have windows that no tensor lies in.
constexpr u64 SHARED_WINDOW = 1ull << 60, PARAMETER_WINDOW = 1ull << 61, WINDOW = 1ull << 32;

struct Program;
struct Thread {
  u32 number, place;  // in the grid, in its program
  Program* program;
  State state = READY;
  jmp_buf here;
  void* stack = nullptr;
  bool begun = false;
  u32 count = 1;  // of races.h
  Known known;
  Meeting meeting;  // in a warp: for what, with which value and mask, and what came of it
  u32 value, mask, result, members;  // members: the lanes that meet, a bit each
};
struct Program {
  u32 number;
  std::vector<Thread> threads;
  std::vector<u8> shared;
  u32 waiting = 0, ended = 0;
};
struct Range {
  u64 begin, end;
};
using Kernel = void (*)(Thread&);

static struct Machine {
  Kernel kernel;
  const u8* parameters;
  u32 bytes;  // of the parameters
  u32 programs, threads;
  double preempt;
  u64 limit, accesses;
  std::mt19937_64 random;
  std::vector<Range> ranges;  // of global memory, by their beginnings
  const char* const* sites;
  Thread* running;
  jmp_buf scheduler;
  std::vector<void*> stacks;
  Cells cells;
  std::unordered_map<u64, Known> released;  // by address
  std::vector<std::string> said;
  std::unordered_set<std::string> seen;
} machine;

static std::string at(u32 site) {
  return machine.sites[site];
}
static void say(const std::string& what) {
  if (machine.seen.insert(what).second) machine.said.push_back(what);
}

// ---- threads ----

static void to_scheduler() {
  if (!_setjmp(machine.running->here)) _longjmp(machine.scheduler, 1);
}
static void maybe_switch(bool surely) {
  if (++machine.accesses > machine.limit) {
    say("no end after " + std::to_string(machine.limit) + " accesses");
    machine.running->state = ENDED;
    to_scheduler();
  }
  if (surely || std::generate_canonical<double, 32>(machine.random) < machine.preempt) to_scheduler();
}
static void release_barrier(Program& program) {
  auto all = std::make_shared<Counts>(*program.threads[0].known);
  const Counts* last = program.threads[0].known.get();
  for (Thread& t : program.threads) {
    if (t.known.get() != last) {
      last = t.known.get();
      for (size_t k = 0; k < all->size(); k++) (*all)[k] = std::max((*all)[k], (*last)[k]);
    }
  }
  for (Thread& t : program.threads) (*all)[t.number] = std::max((*all)[t.number], t.count);
  for (Thread& t : program.threads) {
    t.known = all;
    t.count++;
    if (t.state == AT_BARRIER) t.state = READY;
  }
  program.waiting = 0;
}
static void pass_if_all(Program& program) {
  if (program.waiting && program.waiting + program.ended == program.threads.size()) release_barrier(program);
}
static void barrier(Thread& me, u32) {
  me.state = AT_BARRIER;
  me.program->waiting++;
  pass_if_all(*me.program);
  to_scheduler();
}
static u32 meet(Thread& me, Meeting meeting, u32 value, u32 mask, u32 site, u32 members = ~0u) {
  me.meeting = meeting, me.value = value, me.mask = mask, me.members = members, me.state = IN_WARP;
  Thread* lanes = &me.program->threads[me.place / WARP * WARP];
  if (!(members >> me.place % WARP & 1)) say("a lane is not among those that it meets: " + at(site));
  u32 met = 0;
  for (u32 k = 0; k < WARP; k++) met |= u32(members >> k & 1 && lanes[k].state == IN_WARP) << k;
  if (met == members) {
    s32 least_ = me.value, most_ = me.value;
    u32 least_unsigned = me.value, most_unsigned = me.value;
    auto all = std::make_shared<Counts>(*me.known);
    for (u32 k = 0; k < WARP; k++) {
      if (!(members >> k & 1)) continue;
      if (lanes[k].meeting != meeting || lanes[k].members != members)
        say("the lanes of a warp meet in different instructions: " + at(site));
      least_ = std::min(least_, (s32)lanes[k].value), most_ = std::max(most_, (s32)lanes[k].value);
      least_unsigned = std::min(least_unsigned, lanes[k].value), most_unsigned = std::max(most_unsigned, lanes[k].value);
      if (meeting != GATHER) continue;
      all = std::make_shared<Counts>(*joined(all, lanes[k].known));
      (*all)[lanes[k].number] = std::max((*all)[lanes[k].number], lanes[k].count);
    }
    for (u32 k = 0; k < WARP; k++) {
      if (!(members >> k & 1)) continue;
      Thread& t = lanes[k];
      if (meeting == EXCHANGE && !(members >> (k ^ t.mask) & 1)) say("a lane asks one that is not there: " + at(site));
      switch (meeting) {
        case EXCHANGE: t.result = lanes[(k ^ t.mask) % WARP].value; break;
        case LEAST: t.result = least_; break;
        case MOST: t.result = most_; break;
        case LEAST_UNSIGNED: t.result = least_unsigned; break;
        case MOST_UNSIGNED: t.result = most_unsigned; break;
        case GATHER: t.known = all, t.count++;
      }
      t.state = READY;
    }
  }
  to_scheduler();
  return me.result;
}
static void gather(Thread& me, u32 members, u32 site) { meet(me, GATHER, 0, 0, site, members); }
static u32 exchanged(Thread& me, u32 value, u32 mask, u32 clamp, u32 members, u32 site) {
  if (clamp != 31) say("a part of a warp is no warp of its own here: " + at(site));
  return meet(me, EXCHANGE, value, mask, site, members);
}
[[noreturn]] static void end_thread(Thread& me) {
  me.state = ENDED;
  me.program->ended++;
  pass_if_all(*me.program);
  to_scheduler();
  abort();
}
static void begin_thread() {
  machine.kernel(*machine.running);
  end_thread(*machine.running);
}
static void resume(Thread& t) {
  machine.running = &t;
  if (_setjmp(machine.scheduler)) return;
  if (t.begun) _longjmp(t.here, 1);
  t.begun = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = t.stack;
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, begin_thread, 0);
  setcontext(&context);
}

// ---- memory ----

static bool knows(const Thread& me, const Access& other) {
  return other.thread == me.number || (*me.known)[other.thread] >= other.count;
}
static void compare(const Thread& me, const Access& mine, const char* how, const Access& other, const char* others) {
  if (other.thread == NOBODY || (mine.atomic && other.atomic) || knows(me, other)) return;
  bool one = other.thread / machine.threads == me.program->number;
  say("race: " + at(mine.site) + " (" + how + ") with " + at(other.site) + " (" + others + "), " +
      (one ? "threads of one program" : "two programs"));
}
// key: of the first place, which is GRAIN bytes. same: whether a write changes nothing.
// Threads of one program may all write a value.
static void note(Thread& me, u64 key, u32 bytes, bool write, bool atomic, u32 site, bool same = false) {
  Access mine{me.number, me.count, site, atomic};
  for (u32 k = 0; k < (bytes + GRAIN - 1) / GRAIN; k++) {
    Cell& cell = machine.cells[key + k];
    bool repeated = write && same && cell.write.thread != NOBODY &&
                    cell.write.thread / machine.threads == me.program->number;
    if (!repeated) compare(me, mine, write ? "write" : "read", cell.write, "write");
    if (!write) {
      cell.add(mine);
      continue;
    }
    compare(me, mine, "write", cell.read, "read");
    if (cell.others)
      for (const auto& other : *cell.others) compare(me, mine, "write", other.second, "read");
    cell.written(mine);
  }
}
static bool inside(u64 address, u32 bytes) {
  auto next = std::upper_bound(machine.ranges.begin(), machine.ranges.end(), address,
                               [](u64 x, const Range& range) { return x < range.begin; });
  return next != machine.ranges.begin() && address + bytes <= (next - 1)->end;
}
static bool fits(u64 address, u32 bytes, bool known, u32 site) {
  if (address % bytes) say("misaligned: " + at(site));
  if (!known) say("out of bounds: " + at(site));
  return known && address % bytes == 0;
}
static void acquire(Thread& me, u64 address) {
  auto found = machine.released.find(address);
  if (found != machine.released.end()) me.known = joined(me.known, found->second);
}
static void release(Thread& me, u64 address, bool keep) {
  auto mine = std::make_shared<Counts>(*me.known);
  (*mine)[me.number] = me.count++;
  Known& there = machine.released[address];
  there = keep ? joined(there, mine) : mine;
}

// used: so many bytes of what is loaded matter. The others are neither looked at nor checked.
template <class T, int N>
__attribute__((noinline)) static void load_global(Thread& me, u64 address, int order, u32 site, T* part,
                                                  u32 used = sizeof(T) * N) {
  maybe_switch(order);
  std::memset(part, 0, sizeof(T) * N);
  if (!fits(address, sizeof(T) * N, inside(address, used), site)) return;
  std::memcpy(part, (void*)address, used);
  note(me, address / GRAIN, used, false, order, site);
  if (order & ACQUIRE) acquire(me, address);
}
template <class T, int N>
__attribute__((noinline)) static void store_global(Thread& me, u64 address, int order, u32 site, const T* part) {
  maybe_switch(order);
  if (!fits(address, sizeof(T) * N, inside(address, sizeof(T) * N), site)) return;
  std::memcpy((void*)address, part, sizeof(T) * N);
  note(me, address / GRAIN, sizeof(T) * N, true, order, site);
  if (order & RELEASE) release(me, address, false);
  else machine.released.erase(address);
}
template <class T, class New>
__attribute__((noinline)) static T atomic(Thread& me, u64 address, int order, u32 site, New new_of) {
  maybe_switch(true);
  if (!fits(address, sizeof(T), inside(address, sizeof(T)), site)) return 0;
  T old, now;
  std::memcpy(&old, (void*)address, sizeof(T));
  now = new_of(old);
  std::memcpy((void*)address, &now, sizeof(T));
  note(me, address / GRAIN, sizeof(T), false, true, site);
  note(me, address / GRAIN, sizeof(T), true, true, site);
  if (order & ACQUIRE) acquire(me, address);
  if (order & RELEASE) release(me, address, true);
  return old;
}

static u64 key_of(const Thread& me, u64 address) {
  return (1ull << 62) + ((u64)me.program->number << 18) + address / GRAIN;
}
static bool within(u64 address, u64 bytes, u64 size) {
  return address < size && bytes <= size - address;
}
template <class T, int N>
__attribute__((noinline)) static void load_shared(Thread& me, u64 address, u32 site, T* part,
                                                  u32 used = sizeof(T) * N) {
  maybe_switch(false);
  std::memset(part, 0, sizeof(T) * N);
  if (!fits(address, sizeof(T) * N, within(address, used, me.program->shared.size()), site)) return;
  std::memcpy(part, &me.program->shared[address], used);
  note(me, key_of(me, address), used, false, false, site);
}
template <class T, int N>
__attribute__((noinline)) static void store_shared(Thread& me, u64 address, u32 site, const T* part) {
  maybe_switch(false);
  if (!fits(address, sizeof(T) * N, within(address, sizeof(T) * N, me.program->shared.size()), site)) return;
  u8* there = &me.program->shared[address];
  bool same = !std::memcmp(there, part, sizeof(T) * N);
  std::memcpy(there, part, sizeof(T) * N);
  note(me, key_of(me, address), sizeof(T) * N, true, false, site, same);
}

// The parameters of the kernel. Nobody writes them, so that no read races.
template <class T, int N>
__attribute__((noinline)) static void load_parameter(Thread&, u64 address, u32 site, T* part,
                                                     u32 used = sizeof(T) * N) {
  std::memset(part, 0, sizeof(T) * N);
  if (!fits(address, sizeof(T) * N, within(address, used, machine.bytes), site)) return;
  std::memcpy(part, machine.parameters + address, used);
}
template <class T, int N>
static void load_generic(Thread& me, u64 address, int order, u32 site, T* part, u32 used = sizeof(T) * N) {
  if (address - SHARED_WINDOW < WINDOW) return load_shared<T, N>(me, address - SHARED_WINDOW, site, part, used);
  if (address - PARAMETER_WINDOW < WINDOW)
    return load_parameter<T, N>(me, address - PARAMETER_WINDOW, site, part, used);
  load_global<T, N>(me, address, order, site, part, used);
}
template <class T, int N>
static void store_generic(Thread& me, u64 address, int order, u32 site, const T* part) {
  if (address - SHARED_WINDOW < WINDOW) return store_shared<T, N>(me, address - SHARED_WINDOW, site, part);
  if (address - PARAMETER_WINDOW < WINDOW) return say("a parameter is written: " + at(site));
  store_global<T, N>(me, address, order, site, part);
}

// stmatrix: the lanes exchange addresses and values, then each writes one row of 16 bytes.
__attribute__((noinline)) static void store_matrix(Thread& me, u64 address, u32 site, const u32* part) {
  u32 row[4];
  for (u32 lane = 0; lane < 4; lane++)  // the lanes that hold this lane's row of matrix place / 8
    for (u32 k = 0; k < 4; k++) {
      u32 lanes = me.place % WARP, from = lanes % 8 * 4 + lane, got = 0;
      // Every lane offers register k to all by 32 exchanges; it keeps the one it needs.
      for (u32 mask = 0; mask < WARP; mask++) {
        u32 offered = meet(me, EXCHANGE, part[k], mask, site);
        if ((lanes ^ mask) == from) got = offered;
      }
      if (k == lanes / 8) row[lane] = got;
    }
  store_shared<u32, 4>(me, address, site, row);
}

// ---- a launch ----

// Runs the whole grid. report: what was seen, a line each. Returns the number of accesses.
static u64 launch(Kernel kernel, u32 threads, const char* const* sites, u32 programs, u32 shared,
                  const u8* parameters, u32 bytes, u64 seed, double preempt, u32 resident, const u64* ranges, u32 count,
                  u64 limit, char* report, u32 size) {
  machine.kernel = kernel, machine.threads = threads, machine.sites = sites, machine.programs = programs;
  machine.parameters = parameters, machine.bytes = bytes;
  machine.preempt = preempt, machine.limit = limit, machine.accesses = 0;
  machine.random.seed(seed);
  machine.ranges.clear(), machine.cells.clear(), machine.released.clear(), machine.said.clear(), machine.seen.clear();
  for (u32 k = 0; k < count; k++) machine.ranges.push_back({ranges[2 * k], ranges[2 * k + 1]});
  std::sort(machine.ranges.begin(), machine.ranges.end(), [](auto& a, auto& b) { return a.begin < b.begin; });
  Known nothing = std::make_shared<Counts>(programs * threads, 0);
  std::vector<std::unique_ptr<Program>> live;
  u32 next = 0;
  auto start = [&]() {
    auto program = std::make_unique<Program>();
    program->number = next++;
    program->shared.assign(shared, 0xFF);
    program->threads.resize(threads);
    for (u32 k = 0; k < threads; k++) {
      Thread& t = program->threads[k];
      t.number = program->number * threads + k, t.place = k, t.program = program.get(), t.known = nothing;
      if (machine.stacks.empty())
        machine.stacks.push_back(
            mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      t.stack = machine.stacks.back();
      machine.stacks.pop_back();
    }
    live.push_back(std::move(program));
  };
  std::vector<u32> ready;
  while (true) {
    while (live.size() < resident && next < programs) start();
    if (live.empty()) break;
    bool ran = false;
    u64 first = machine.random() % live.size();
    for (size_t k = 0; k < live.size() && !ran; k++) {
      Program& program = *live[(first + k) % live.size()];
      ready.clear();
      for (u32 i = 0; i < threads; i++)
        if (program.threads[i].state == READY) ready.push_back(i);
      if (ready.empty()) continue;
      ran = true;
      u64 turns = 1 + machine.random() % (4 * threads), from = machine.random() % ready.size();
      for (u64 turn = 0; turn < turns; turn++) {
        Thread& t = program.threads[ready[(from + turn) % ready.size()]];
        if (t.state == READY) resume(t);
      }
    }
    if (!ran) {
      u32 waiting = 0;
      for (auto& program : live) waiting += program->waiting;
      say("deadlock: " + std::to_string(live.size()) + " programs have not ended, " + std::to_string(waiting) +
          " threads wait at barriers");
      break;
    }
    for (size_t k = 0; k < live.size();) {
      auto& of = live[k]->threads;
      if (!std::all_of(of.begin(), of.end(), [](Thread& t) { return t.state == ENDED; })) {
        k++;
        continue;
      }
      for (Thread& t : of) machine.stacks.push_back(t.stack);
      live.erase(live.begin() + k);
    }
  }
  std::string all;
  for (auto& line : machine.said) all += line + "\n";
  std::snprintf(report, size, "%s", all.c_str());
  machine.cells.clear();
  return machine.accesses;
}
