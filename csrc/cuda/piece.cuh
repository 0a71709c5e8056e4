// Piece: what a program does with its piece of a tensor, a round of all teams at a time.
#pragma once

#include "spot.cuh"

namespace robustft {
namespace {

// How the teams go through a piece: several rows at a time, as many as their blocks go round.
template <class K>
class Round {
 public:
  __device__ Round(const Piece& piece)
      : piece_(piece), blocks_(int((piece.end - piece.begin + kBlock - 1) / kBlock)) {
    if (blocks_ == 0) blocks_ = 1;
    together_ = kTeams / blocks_;
  }

  __device__ int64_t step() const { return together_; }
  __device__ int blocks() const { return blocks_; }
  // How many rows the round has that begins with the row `first`.
  __device__ int rows(int64_t first) const {
    const int64_t left = piece_.row + piece_.rows - first;
    return int(left < together_ ? left : together_);
  }
  __device__ int row() const { return team() / blocks_; }  // of this team, in the round
  static __device__ int team() { return threadIdx.x / K::kTeam; }

  // Calls f(neighbours, place, lane) for this thread's part of its team's block of a row: kSide neighbours at once where
  // they lie side by side at a multiple of their size, else one.
  template <class F>
  __device__ __forceinline__ void each(const Rows& rows, int64_t row, bool aligned, const F& f) const {
    constexpr int kSide = K::kSide;
    const int64_t begin = piece_.begin + team() % blocks_ * kBlock;
    const int n = int(piece_.end - begin < kBlock ? piece_.end - begin : kBlock), first = threadIdx.x % K::kTeam * kSide;
    int i = first;
    const int64_t place = rows.contiguous() ? rows.place(row, begin) : 0;
    if (aligned && rows.contiguous() && place % kSide == 0)
      for (; i + kSide <= n; i += kLanes) {
        asm volatile("" ::: "memory");  // what is in shared memory stays there, and takes no registers
        f(std::integral_constant<int, kSide>(), place + i, 0);
      }
    while (i < n) {
      f(std::integral_constant<int, 1>(), rows.contiguous() ? place + i : rows.place(row, begin + i), i % kSide);
      i += i % kSide == kSide - 1 ? kLanes - kSide + 1 : 1;
    }
  }

 private:
  const Piece& piece_;
  int blocks_, together_;
};

// The base step on this thread's part of a round.
template <class K, bool kRows, class Base, class Hyper, class Sums>
__device__ __forceinline__ void step_round(const Args& args, const Setup<Base, Hyper>& s, int64_t row, Sums& sums) {
  using T = typename K::Number;
  const Round<K> round(s.piece);
  if (round.row() >= (kRows ? round.rows(row) : 1)) return;
  const Entry& e = args.entries[s.owner];
  row += round.row();
  const double alpha = e.rule.given ? args.alphas[e.segment + (e.rule.by_rows ? row : 0)] : s.alpha;
  const T sign = kRows && e.rule.sign && row == args.largest[s.owner] ? T(s.sign) : T(0);
  const RowTerms<T> terms{Known<T>::of(alpha, s.param.cautious), T(s.linear), sign, s.key, s.moments_key, s.flags};
  if (!Base::kMoves && !s.flags.measures && terms.known.leaves_alone()) return;
  Waiting<K, Base::kStates> waiting;
  round.each(s.param.rows, row, s.aligned, [&](auto side, int64_t place, int lane) {
    step_spot<K, kRows ? Measuring::magnitudes : Measuring::squares, side>(s.param, s.base, terms, place, lane, sums,
                                                                           waiting);
  });
}

// Adds up what the teams of a round have found. The sums of row r are left in room.lanes[r * blocks], the m-th at
// m * kLanes.
template <class K, class Sums>
__device__ void add_up(const Sums& sums, const Piece& piece, int64_t row, Room& room) {
  const Round<K> round(piece);
  const int rows = round.rows(row);
  const int member = threadIdx.x % K::kTeam;
  sums.each([&](int m, const auto& lanes) {
#pragma unroll
    for (int j = 0; j < K::kSide; ++j)
      room.lanes[round.team()][m * kLanes + member * K::kSide + j] = double(lanes[j]);
  });
  __syncthreads();
  for (int item = threadIdx.x; item < rows * kMeasures * kLanes; item += K::kThreads) {
    const int first = item / (kMeasures * kLanes) * round.blocks(), lane = item % (kMeasures * kLanes);
    double sum = 0;
    for (int b = 0; b < round.blocks(); ++b) sum += room.lanes[first + b][lane];
    room.lanes[first][lane] = sum;
  }
  __syncthreads();
  for (int item = threadIdx.x; item < rows * kMeasures; item += K::kThreads) {
    double* const lanes = room.lanes[item / kMeasures * round.blocks()] + item % kMeasures * kLanes;
    double sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += lanes[l];
    lanes[0] = sum;
  }
  __syncthreads();
}

__device__ Measures added_up(const Room& room, int at, double sign) {
  double sums[kMeasures];
  for (int m = 0; m < kMeasures; ++m) sums[m] = room.lanes[at][m * kLanes];
  return Measures::of_sums(sums, sign);
}

template <class K, class Base, class Hyper>
__device__ void pull_piece(const Setup<Base, Hyper>& s, bool by_rows, const double* alphas) {
  using T = typename K::Number;
  using Pull = NoStep<T>;
  const Round<K> round(s.piece);
  for (int64_t row = s.piece.row; row < s.piece.row + s.piece.rows; row += round.step()) {
    if (round.row() >= round.rows(row)) continue;
    const int64_t mine = row + round.row();
    const T alpha = T(alphas[by_rows ? mine : 0]);
    if (alpha == 1) continue;
    const RowTerms<T> terms{{alpha, 0}, 0, 0, s.pull_key, 0, s.flags};
    BlockSums<T, Measuring::none, K::kSide> none;
    Waiting<K, 0> nothing;
    round.each(s.param.rows, mine, s.aligned, [&](auto side, int64_t place, int lane) {
      step_spot<K, Measuring::none, side>(s.param, Pull(NoStepHyper{}, 0, 1), terms, place, lane, none, nothing);
    });
  }
}

// Measures what is in memory, without a step: numbers, an anchor and gradients, one sum for each row of a piece.
template <class K, Measuring kMeasuring>
__device__ void observe(const Param& seen, const Piece& piece, double sign, bool graded, Measures* found, Room& room) {
  using T = typename K::Number;
  const NoStep<T> base(NoStepHyper{}, 0, sign);
  const bool aligned = (misaligned(seen.param) | misaligned(seen.working)) == 0;
  const Round<K> round(piece);
  const Flags flags{true, graded, misaligned(seen.grad) != 0, misaligned(seen.anchor) != 0};
  const RowTerms<T> terms{{}, 0, 0, 0, 0, flags};
  for (int64_t row = piece.row; row < piece.row + piece.rows; row += round.step()) {
    const int rows = round.rows(row);
    BlockSums<T, kMeasuring, K::kSide> sums;
    Waiting<K, 0> nothing;
    if (round.row() < rows)
      round.each(seen.rows, row + round.row(), aligned, [&](auto side, int64_t place, int lane) {
        step_spot<K, kMeasuring, side>(seen, base, terms, place, lane, sums, nothing);
      });
    add_up<K>(sums, piece, row, room);
    if (threadIdx.x < rows)
      found[row - piece.row + threadIdx.x] = added_up(room, threadIdx.x * round.blocks(), base.sign);
    __syncthreads();
  }
}

}  // namespace
}  // namespace robustft
