// Codes: moments in 8 bits, read as numbers and written again. A team of threads has half of a block at a time.
#pragma once

#include "setup.cuh"
#include "streams.cuh"

namespace robustft {
namespace {

__device__ __forceinline__ uint32_t bits_at(uint32_t key, int64_t place) {
  return random_bits(key, uint32_t(place), upper_bits(key, place));
}

// Reads the codes of kSide neighbours as numbers. The first moment has a sign.
template <bool kSigned, int kSide>
__device__ __forceinline__ void fetch_codes(float (&numbers)[kSide], const Buffer& from, int64_t place) {
#pragma unroll
  for (float& number : numbers) number = 0;
  if (from.data == nullptr) return;
  uint32_t word;
  load_bytes<kSide>(&word, global<char>(from, place, 1));
  const float scale = EightBit<kSigned>::scale(from.scales[place / kScaled]);
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
    const uint32_t byte = word >> 8 * j & 0xff;
    numbers[j] = EightBit<kSigned>::decoded(kSigned ? float(int8_t(byte)) : float(byte), scale);
  }
}

// A thread's moments of a block, until its team has all of them. The block is two rounds of the team.
template <class K, int kStates>
struct Waiting {
  static constexpr int kBoth = 2 * K::kSide;
  static_assert(kScaled == 2 * kLanes, "a block is two rounds of a team");
  float numbers[kStates ? kStates : 1][kBoth];

  // Takes kSide neighbours from a place on. lane: of the first, among those of this thread in the round. With the last
  // of the block, writes the codes of all to `to`. The third moment is rounded to nearest.
  template <int kSide, class T>
  __device__ __forceinline__ void take(const T (&moments)[kStates ? kStates : 1][kSide], const Buffer* to, int64_t place,
                                       int lane, uint32_t key) {
    const int at = int(place % kScaled) / kLanes * K::kSide + lane;
#pragma unroll
    for (int j = 0; j < kBoth; ++j) {
#pragma unroll
      for (int k = 0; k < kStates; ++k)  // registers have no index that varies
        if (kSide == 1 ? j == at : j / kSide * kSide == at) numbers[k][j] = moments[k][j % kSide];
    }
    if (at + kSide < kBoth) return;
    const int64_t block = place / kScaled * kScaled, mine = block + threadIdx.x % K::kTeam * K::kSide;
    write<kSide, 0, true>(to, block, mine, key);
    if constexpr (kStates > 1) write<kSide, 1, false>(to, block, mine, key);
    if constexpr (kStates > 2) write<kSide, 2, false>(to, block, mine, key);
  }

 private:
  // kSide: how many neighbours lie at a multiple of their size.
  template <int kSide, int kMoment, bool kSigned>
  __device__ __forceinline__ void write(const Buffer* all, int64_t block, int64_t mine, uint32_t key) const {
    using Format = EightBit<kSigned>;
    const Buffer& to = all[kMoment];
    if (to.data == nullptr) return;
    uint32_t largest = 0;
#pragma unroll
    for (const float x : numbers[kMoment]) largest = max(largest, bit_cast<uint32_t>(x) & 0x7fffffffu);
    const uint32_t team = ((1u << K::kTeam) - 1) << (threadIdx.x % 32 / K::kTeam * K::kTeam);
#pragma unroll
    for (int other = 1; other < K::kTeam; other *= 2) largest = max(largest, __shfl_xor_sync(team, largest, other));
    const uint32_t e = Format::scale_for(largest);
    const float inverse = Format::inverse(e);
#pragma unroll
    for (int round = 0; round < 2; ++round) {
      const int64_t place = mine + round * kLanes;
      uint32_t word = 0;
#pragma unroll
      for (int j = 0; j < K::kSide; ++j) {
        const uint32_t bits = kMoment == 2 ? 0 : bits_at(key, place + j);
        const uint32_t chance = kMoment == 2 ? 0x8000 : kMoment == 1 ? bits & 0xffff : bits >> 16;
        const float code = Format::code(numbers[kMoment][round * K::kSide + j], inverse, chance);
        word |= (uint32_t(int32_t(code)) & 0xff) << 8 * j;
      }
#pragma unroll
      for (int j = 0; j < K::kSide; j += kSide, word >>= 8) store_bytes<kSide>(&word, global<char>(to, place + j, 1));
    }
    __syncwarp(team);  // the others have read the old one
    if (mine == block) to.scales[block / kScaled] = uint8_t(e);
  }
};

}  // namespace
}  // namespace robustft
