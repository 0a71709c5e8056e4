// Upload: numbers on the device that the host rewrites, without waiting for the copies under way.
#pragma once

#include <cstring>
#include <deque>

#include "driver.h"

namespace robustft::cuda {

// A ring of pinned buffers, each with an event that tells when its copy is done. The ring grows when none is free.
//
// A send that a CUDA graph captures keeps its buffer, since its copy runs again at each replay. No memory can be pinned
// under capture, so kSpares buffers are kept ready, and replaced by the next send outside of a capture.
class Upload {
 public:
  static constexpr size_t kSpares = 8;

  Upload(const Driver& driver, Address to, size_t bytes) : driver_(driver), to_(to), bytes_(bytes) {
    for (int k = 0; k < 2; ++k) ring_.push_back(slot());
    fill_spares();
  }
  ~Upload() {
    for (const Slot& of : ring_) driver_.cuEventDestroy_v2(of.event), driver_.cuMemFreeHost(of.memory);
    for (void* memory : spares_) driver_.cuMemFreeHost(memory);
    // What a graph has captured stays: it may be replayed.
  }
  Upload(const Upload&) = delete;

  // The buffer to write before `send`.
  void* host(void* stream) {
    capturing_ = 0;
    driver_.check(driver_.cuStreamIsCapturing(stream, &capturing_), "tell of a stream");
    if (capturing_) {
      TORCH_CHECK(!spares_.empty(), "robustft: CUDA graphs have captured ", kSpares,
                  " sends of a step's numbers since the last step outside of a capture, and no pinned buffer is left; "
                  "make a step outside between captures");
      return spares_.back();
    }
    fill_spares();
    if (driver_.cuEventQuery(ring_.front().event) != 0) ring_.push_front(slot());
    return ring_.front().memory;
  }

  // Copies that buffer to the device, in the order of the stream, unless the device has the same already.
  void send(void* stream) {
    if (capturing_) {
      copy(spares_.back(), stream);
      spares_.pop_back();
      captured_ = true;
      sent_ = nullptr;
      return;
    }
    const Slot front = ring_.front();
    if (sent_ && !captured_ && std::memcmp(front.memory, sent_, bytes_) == 0) return;
    copy(front.memory, stream);
    driver_.check(driver_.cuEventRecord(front.event, stream), "record an event");
    sent_ = front.memory;
    ring_.pop_front();
    ring_.push_back(front);
  }

 private:
  struct Slot {
    void *memory, *event;
  };

  Slot slot() {
    Slot of{pinned(), nullptr};
    constexpr unsigned kNoTiming = 2;
    driver_.check(driver_.cuEventCreate(&of.event, kNoTiming), "create an event");
    return of;
  }
  void* pinned() {
    void* memory = nullptr;
    driver_.check(driver_.cuMemHostAlloc(&memory, bytes_ ? bytes_ : 1, 0), "pin memory of the host");
    std::memset(memory, 0, bytes_);
    return memory;
  }
  void fill_spares() {
    while (spares_.size() < kSpares) spares_.push_back(pinned());
  }
  void copy(const void* from, void* stream) {
    driver_.check(driver_.cuMemcpyHtoDAsync_v2(to_, from, bytes_, stream), "copy to the device");
  }

  const Driver& driver_;
  const Address to_;
  const size_t bytes_;
  std::deque<Slot> ring_;
  std::vector<void*> spares_;
  const void* sent_ = nullptr;
  bool captured_ = false;  // whether any graph has a copy, which may overwrite what was sent
  int capturing_ = 0;
};

}  // namespace robustft::cuda
