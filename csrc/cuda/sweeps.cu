// The sweeps: the kernels that are launched. A program is kTeams teams of threads, and works on one piece of a tensor.
// Each team adds up a block of kBlock elements. There a thread has lanes of its own, so that nothing moves between
// threads until the blocks are done.
#include "../base.h"
#include "../pull.h"
#include "streams.cuh"

namespace robustft {
namespace {

// ---- what all threads of a program share ----

constexpr int kMostThreads = 512;
constexpr double kInfinite = std::numeric_limits<double>::infinity();

// Shared memory for an object that has no constructor to run.
template <class Object>
struct Shared {
  alignas(16) unsigned char bytes[sizeof(Object)];
  __device__ Object& operator*() { return *reinterpret_cast<Object*>(bytes); }
};

struct Room {
  Room() = delete;
  union {
    double lanes[kTeams][kMeasures * kLanes];  // of each team's block
    Measures sums[kMostThreads];
    double numbers[kMostThreads];
  };
  double alphas[kTeams];  // of the rows of a round
  Measures total;
  bool last;
};

struct Flags {
  bool measures;  // whether alpha waits for what is measured
  bool graded;    // whether there are gradients
  bool grads_apart, anchors_apart;  // whether these begin at no multiple of 16 bytes
};

template <class Base, class Hyper>
struct Setup {
  Setup() = delete;
  union {
    Hyper hyper;
    double columns[sizeof(Hyper) / sizeof(double)];
  };
  Param param;  // with its gradient
  Base base;
  Terms terms;
  Piece piece;
  double t, alpha;  // the step's number, and alpha if it is known before the sweep
  double linear, sign;
  int64_t penalty_row;
  uint32_t key, pull_key, moments_key;
  bool aligned;   // whether what is written begins at multiples of 16 bytes
  Flags flags;
  bool at_once;   // whether each row is decided and pulled as soon as it is measured
  int32_t owner;
};

__device__ __forceinline__ uint32_t misaligned(const Buffer& buffer) {
  return uint32_t(reinterpret_cast<uint64_t>(buffer.data) & 15);
}

__device__ __forceinline__ bool skips(const Args& args) { return args.found_inf && *args.found_inf != 0; }

// What one thread works out for all. It is not inlined, nor is what follows a loop over elements: its registers are then
// not those of the loop.
template <class Base, class Hyper>
__device__ __noinline__ void work_out(const Args& args, int32_t owner, Setup<Base, Hyper>& s) {
  const Entry& e = args.entries[owner];
  const double scale = args.grad_scale ? *args.grad_scale : 1;
  s.t = e.step ? *e.step + Base::kMoves : 0;
  s.base = Base(s.hyper, s.t, (s.hyper.maximize ? -1 : 1) / scale);
  s.terms = terms_of(s.hyper);
  if (e.rule.learning != Learning::none) s.terms.radius = e.learned[0];
  s.piece = Pieces(e.param.rows)[blockIdx.x - e.program];
  s.alpha = e.rule.given ? 1 : alpha_of(e.rule.alpha, Measures::filled(0), s.terms);
  const Penalty penalty = e.rule.penalty(s.terms.strength);
  s.linear = penalty.linear, s.sign = penalty.sign;
  s.pull_key = rounding_key(e.param.seed, s.t, Phase::pull);
  s.key = Base::kMoves ? rounding_key(e.param.seed, s.t, Phase::step) : s.pull_key;
  s.moments_key = rounding_key(e.param.seed, s.t, Phase::moments);
  Param& p = s.param = e.param;
  p.grad.data = args.graded ? args.grads[owner] : nullptr;
  uint32_t odd = misaligned(p.param) | misaligned(p.working) | misaligned(p.delta);
  for (const Buffer& state : p.state) odd |= misaligned(state);
  s.aligned = odd == 0;
  s.flags = {e.rule.measuring != Measuring::none, bool(args.graded), misaligned(p.grad) != 0, misaligned(p.anchor) != 0};
  s.at_once = e.rule.by_rows && !e.rule.tied && !Pieces(p.rows).split();
  s.owner = owner;
}

template <class Base, class Hyper>
__device__ void set_up(const Args& args, int32_t owner, Setup<Base, Hyper>& s) {
  constexpr int kColumns = sizeof(Hyper) / sizeof(double);
  if (threadIdx.x < kColumns) {
    const int64_t at = args.entries[owner].hyper + threadIdx.x, live = args.live ? args.live[at] : 0;
    s.columns[threadIdx.x] = live == 0  ? args.hyper[at]
                             : live & 1 ? *reinterpret_cast<const double*>(live - 1)
                                        : *reinterpret_cast<const float*>(live);
  }
  __syncthreads();
  if (threadIdx.x == 0) work_out(args, owner, s);
  __syncthreads();
}

// ---- a few neighbours ----

__device__ __forceinline__ uint32_t bits_at(uint32_t key, int64_t place) {
  return random_bits(key, uint32_t(place), upper_bits(key, place));
}

template <class T>
struct RowTerms {
  T alpha;            // known before the sweep
  T linear, sign;     // of the penalty
  uint32_t key, moments_key;
  const Flags& flags;
};

// Makes the base step, then pulls by a known alpha or measures.
// kSide: how many neighbours it takes, from a place on. lane: of the first, among those of this thread.
template <class K, Measuring kMeasuring, int kSide, class Base, class T, class Sums>
__device__ __forceinline__ void step_spot(const Param& p, const Base& base, const RowTerms<T>& terms, int64_t place,
                                          int lane, Sums& sums) {
  constexpr bool kRare = !K::kPlain;
  constexpr int kStates = Base::kStates - (K::kPlain && Base::kStates == 3);
  constexpr int kOptional = Base::kStates - 1;
  const bool measures = kMeasuring != Measuring::none && (K::kPlain || terms.flags.measures), writes = Base::kMoves || !measures;
  const DType param_as = dtype_of<K::kParamAs>(p.param), grad_as = dtype_of<K::kGradAs>(p.grad);
  const DType anchor_as = dtype_of<K::kAnchorAs>(p.anchor), state_as = dtype_of<K::kStateAs>(p.state[0]);
  const bool all = kOptional >= 0 && kOptional < kStates && p.state[kOptional < 0 ? 0 : kOptional].data != nullptr;

  Image<T, kSide> params, grads, anchors, working, states[kStates ? kStates : 1];
  fetch<T, kSide>(params, p.param, param_as, place);
  if constexpr (Base::kMoves || kMeasuring != Measuring::none)
    kSide > 1 && terms.flags.grads_apart ? fetch_apart(grads, p.grad, grad_as, place)
                                         : fetch(grads, p.grad, grad_as, place);
  kSide > 1 && terms.flags.anchors_apart ? fetch_apart(anchors, p.anchor, anchor_as, place)
                                         : fetch(anchors, p.anchor, anchor_as, place);
  if constexpr (kRare) fetch<T, kSide>(working, p.working, p.working.dtype, place);
#pragma unroll
  for (int k = 0; k < kStates; ++k) fetch<T, kSide>(states[k], p.state[k], state_as, place);

  T next[kSide], moments[kStates ? kStates : 1][kSide], delta[kSide];
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
    asm volatile("" ::: "memory");
    T param = number<T>(params, param_as, j);
    if constexpr (kRare)
      if (p.working.data) param = reconciled(p.working.dtype, number<T>(working, p.working.dtype, j), param);
    const T anchor = number<T>(anchors, anchor_as, j), d = param - anchor;
    T grad = param;  // without a gradient, the sum of its products means nothing
    if constexpr (Base::kMoves || kMeasuring != Measuring::none)
      if (Base::kMoves || terms.flags.graded) grad = number<T>(grads, grad_as, j);
    T used = grad;
    if constexpr (kRare && Base::kMoves)
      if (terms.linear != 0 || terms.sign != 0) used = penalized<T>(base.sign, terms.linear, terms.sign, d, grad);
    T state[Base::kStates ? Base::kStates : 1] = {};
#pragma unroll
    for (int k = 0; k < kStates; ++k) state[k] = number<T>(states[k], state_as, j);
    next[j] = base(param, used, state, all);
#pragma unroll
    for (int k = 0; k < kStates; ++k) moments[k][j] = state[k];
    if (!measures && terms.alpha != 1) next[j] = pulled<T>(terms.alpha, next[j], anchor);
    if constexpr (sizeof(T) == 4) {
      if (kRare && p.dithered && writes) {
        next[j] = dithered(next[j], bits_at(terms.key, place + j) >> 16);
      } else {
        next[j] = nearest(param_as, next[j]);
      }
      if constexpr (kRare && kStates > 0)
        if (p.low_state && p.state[0].data) {
          const uint32_t bits = bits_at(terms.moments_key, place + j);
          moments[0][j] = dithered(moments[0][j], bits >> 16);
          if constexpr (kStates > 1) moments[1][j] = dithered(moments[1][j], bits & 0xffff);
        }
    }
    if constexpr (kMeasuring != Measuring::none) {
#pragma unroll
      for (int l = 0; l < K::kSide; ++l)  // accumulators are registers, which have no index that varies
        if (measures && l == (kSide == 1 ? lane : j)) sums.add(l, param, next[j], grad, d);
    }
    delta[j] = next[j] - anchor;
  }

  asm volatile("" ::: "memory");  // as in Round::each
  if (!writes) return;
#pragma unroll
  for (int k = 0; k < kStates; ++k)
    if (k < kOptional || all) put<T, kSide>(moments[k], p.state[k], state_as, place);
  if constexpr (kRare) {
    if (measures && p.delta.data) put<T, kSide>(delta, p.delta, dtype_of<K::kParamAs>(p.delta), place);
    if (p.working.data) put<T, kSide>(next, p.working, p.working.dtype, place);
  }
  put<T, kSide>(next, p.param, param_as, place);
}

// ---- a piece ----

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
  const RowTerms<T> terms{T(alpha), T(s.linear), sign, s.key, s.moments_key, s.flags};
  if (!Base::kMoves && !s.flags.measures && terms.alpha == 1) return;
  round.each(s.param.rows, row, s.aligned, [&](auto side, int64_t place, int lane) {
    step_spot<K, kRows ? Measuring::magnitudes : Measuring::squares, side>(s.param, s.base, terms, place, lane, sums);
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

// `sign` turns g into the gradient of what the step minimizes.
__device__ Measures added_up(const Room& room, int at, double sign) {
  double sums[kMeasures];
  for (int m = 0; m < kMeasures; ++m) sums[m] = room.lanes[at][m * kLanes];
  Measures all = Measures::read(sums);
  all.grad_dot_delta *= sign;
  return all;
}

// Whether this program is the last of its tensor. What the others have written can then be read.
__device__ bool comes_last(int32_t* counter, int32_t programs, Room& room) {
  __syncthreads();  // the whole program has written what others will read, and read what the last one will write
  if (programs == 1) return true;
  if (threadIdx.x == 0) {
    int32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    room.last = before == programs - 1;
    if (room.last) *counter = 0;
  }
  __syncthreads();
  return room.last;
}

// The sum of n values on all threads of a program. Every thread gets it.
template <class K, class Sum, class At>
__device__ Sum folded_by_all(int64_t n, Sum* room, const At& at) {
  Sum sum{};
  const int64_t groups = groups_of(n);
  for (int64_t first = 0; first < groups; first += K::kThreads) {
    __syncthreads();
    if (first + threadIdx.x < groups) room[threadIdx.x] = group_sum<Sum>(first + threadIdx.x, n, at);
    __syncthreads();
    for (int64_t g = first; g < groups && g < first + K::kThreads; ++g) sum += room[g - first];
  }
  return sum;
}

// The index of the first largest of n values, none of which is nan or negative but those that never count. -1: none.
template <class K, class At>
__device__ int64_t first_largest(int64_t n, double* room, int64_t* places, const At& at) {
  double most = -1;
  int64_t place = -1;
  for (int64_t i = threadIdx.x; i < n; i += K::kThreads)
    if (const double value = at(i); value > most) most = value, place = i;
  __syncthreads();
  room[threadIdx.x] = most, places[threadIdx.x] = place;
  __syncthreads();
  for (int k = 0; k < K::kThreads; ++k)
    if (room[k] > most || (room[k] == most && places[k] >= 0 && places[k] < place)) most = room[k], place = places[k];
  return place;
}

// ---- kernels ----

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
    const RowTerms<T> terms{alpha, 0, 0, s.pull_key, 0, s.flags};
    BlockSums<T, Measuring::none, K::kSide> none;
    round.each(s.param.rows, mine, s.aligned, [&](auto side, int64_t place, int lane) {
      step_spot<K, Measuring::none, side>(s.param, Pull(NoStepHyper{}, 0, 1), terms, place, lane, none);
    });
  }
}

// What was found of a row, whose parts are folded.
__device__ Measures found_of(const Args& args, const Entry& e, int64_t row, int64_t parts) {
  const Measures* const first = args.found + e.found + row * parts;
  return parts == 1 ? *first : folded<Measures>(parts, [&](int64_t part) { return first[part]; });
}

// Decides for the rows of a tensor whose programs are all done.
template <class K>
__device__ void decide_rows(const Args& args, const Entry& e, const Terms& terms, Room& room) {
  const int64_t rows = e.param.rows.count, parts = Pieces(e.param.rows).parts();
  double tied = 1;
  if (e.rule.tied) {  // the largest row's; one that is not finite counts as infinite
    Measures largest;
    for (int64_t row = threadIdx.x; row < rows; row += K::kThreads) {
      const Measures m = found_of(args, e, row, parts);
      if (!isfinite(row_norm(m))) largest.before = kInfinite;
      if (row_norm(m) > row_norm(largest)) largest = m;
    }
    room.sums[threadIdx.x] = largest;
    __syncthreads();
    for (int k = 0; k < K::kThreads; ++k)
      if (row_norm(room.sums[k]) > row_norm(largest)) largest = room.sums[k];
    if (isfinite(row_norm(largest))) tied = alpha_of(e.rule.alpha, largest, terms);
  }
  for (int64_t row = threadIdx.x; row < rows; row += K::kThreads) {
    const Measures m = found_of(args, e, row, parts);
    record(args.results, args.alphas, e.segment + row, m, e.rule.tied ? tied : alpha_of(e.rule.alpha, m, terms),
           args.graded);
  }
  __syncthreads();
}

// Brings a learned radius under the largest row, unless one is not finite.
template <class K>
__device__ void bound_radius(const Args& args, const Entry& e, Room& room) {
  double largest = 0;
  for (int64_t row = threadIdx.x; row < e.param.rows.count; row += K::kThreads) {
    const double n = row_norm(Measures::read(args.results + kResults * (e.segment + row))) + kRowEps;
    largest = !isfinite(n) ? kInfinite : n > largest ? n : largest;
    if (!isfinite(n)) break;
  }
  room.numbers[threadIdx.x] = largest;
  __syncthreads();
  if (threadIdx.x > 0 || e.param.rows.count == 0) return;
  for (int k = 0; k < K::kThreads; ++k) largest = room.numbers[k] > largest ? room.numbers[k] : largest;
  if (largest < e.learned[0]) e.learned[0] = largest;
}

// Records what a round has found, or keeps it for the tensor's last program.
template <class K, bool kRows, class Base, class Hyper>
__device__ __noinline__ void keep_sums(const Args& args, const Setup<Base, Hyper>& s, int64_t row, Room& room) {
  const Round<K> round(s.piece);
  if (threadIdx.x >= round.rows(row)) return;
  const Entry& e = args.entries[s.owner];
  const Measures m = added_up(room, threadIdx.x * round.blocks(), s.base.sign);
  const int64_t program = blockIdx.x - e.program;
  if (kRows && s.at_once) {
    record(args.results, args.alphas, e.segment + row + threadIdx.x, m, alpha_of(e.rule.alpha, m, s.terms), args.graded);
  } else if (kRows) {
    args.found[e.found + Pieces(s.param.rows).first_found(program) + row + threadIdx.x - s.piece.row] = m;
  } else {
    room.total = m;
    if (e.programs > 1) args.found[e.found + program] = m;
  }
}

// What is left once all rows of a program are measured.
template <class K, bool kRows, class Base, class Hyper>
__device__ __noinline__ void conclude(const Args& args, const Setup<Base, Hyper>& s, Room& room) {
  const Entry& e = args.entries[s.owner];
  const bool measures = s.flags.measures, at_once = kRows && s.at_once;
  if (!comes_last(args.counters + s.owner, e.programs, room)) return;
  if (kRows && measures && !at_once) decide_rows<K>(args, e, s.terms, room);
  if (kRows && e.rule.learning != Learning::none) bound_radius<K>(args, e, room);
  if (!kRows && measures) {
    Measures total = room.total;
    if (e.programs > 1)
      total = folded_by_all<K, Measures>(e.programs, room.sums, [&](int64_t i) { return args.found[e.found + i]; });
    __syncthreads();
    if (threadIdx.x == 0)
      record(args.results, args.alphas, e.segment, total, alpha_of(e.rule.alpha, total, s.terms), args.graded);
  }
  if (!measures)  // the caller has given what is recorded, or the rule knows it
    for (int64_t k = threadIdx.x; k < (e.rule.by_rows ? s.param.rows.count : 1); k += K::kThreads) {
      const double alpha = e.rule.given ? args.alphas[e.segment + k] : s.alpha;
      record(args.results, args.alphas, e.segment + k, Measures::filled(std::numeric_limits<double>::quiet_NaN()), alpha,
             args.graded);
    }
  if (Base::kMoves && e.step && threadIdx.x == 0) *e.step = float(s.t);
  __syncthreads();
  if (measures && !at_once && e.programs == 1) pull_piece<K>(s, e.rule.by_rows, args.alphas + e.segment);
}

// Sweep 1: one program for each piece.
template <template <class> class BaseOf, class Hyper, class K, bool kRows>
__device__ void step(const Args& args) {
  using T = typename K::Number;
  using Base = BaseOf<T>;
  constexpr Measuring kMeasuring = kRows ? Measuring::magnitudes : Measuring::squares;
  __shared__ Shared<Room> of_room;
  Room& room = *of_room;
  __shared__ Shared<Setup<Base, Hyper>> of_setup;
  auto& s = *of_setup;
  if (skips(args)) return;
  set_up(args, args.owners[blockIdx.x], s);
  // What follows reads the setup again after the loop over elements, so that the loop has all registers.
  const int64_t end = kRows ? s.piece.row + s.piece.rows : 1;
  for (int64_t row = kRows ? s.piece.row : 0; row < end; row += Round<K>(s.piece).step()) {
    BlockSums<T, kMeasuring, K::kSide> sums;
    step_round<K, kRows>(args, s, row, sums);
    if (!s.flags.measures) continue;
    add_up<K>(sums, s.piece, row, room);
    keep_sums<K, kRows>(args, s, row, room);
    __syncthreads();
  }
  if (kRows && s.at_once && s.flags.measures) pull_piece<K>(s, true, args.alphas + args.entries[s.owner].segment);
  conclude<K, kRows>(args, s, room);
}

// Sweep 2, for what sweep 1 could not pull itself. The last programs of the table come first: sweep 1 left their memory
// in the cache.
template <class K>
__device__ void pull(const Args& args) {
  using Base = NoStep<typename K::Number>;
  __shared__ Shared<Setup<Base, NoStepHyper>> of_setup;
  auto& s = *of_setup;
  if (skips(args)) return;
  const int64_t index = int64_t(gridDim.x) - 1 - blockIdx.x;
  const Entry& e = args.entries[args.owners[index]];
  const double* const alphas = args.alphas + e.segment;
  if (!e.rule.by_rows && alphas[0] == 1) return;
  if (threadIdx.x == 0) {
    const Param& p = s.param = e.param;
    s.piece = Pieces(p.rows)[index - e.program];
    s.pull_key = rounding_key(p.seed, e.step ? *e.step : 0, Phase::pull);
    s.aligned = (misaligned(p.param) | misaligned(p.working)) == 0;
    s.flags.anchors_apart = misaligned(p.anchor) != 0;
  }
  __syncthreads();
  pull_piece<K>(s, e.rule.by_rows, alphas);
}

// Measures what is in memory, without a step: numbers, an anchor and gradients, one sum for each row of a piece.
template <class K, Measuring kMeasuring>
__device__ void observe(const Param& seen, const Piece& piece, double sign, bool graded, Measures* found, Room& room) {
  using T = typename K::Number;
  const NoStep<T> base(NoStepHyper{}, 0, sign);
  const bool aligned = (misaligned(seen.param) | misaligned(seen.working)) == 0;
  const Round<K> round(piece);
  const Flags flags{true, graded, misaligned(seen.grad) != 0, misaligned(seen.anchor) != 0};
  const RowTerms<T> terms{1, 0, 0, 0, 0, flags};
  for (int64_t row = piece.row; row < piece.row + piece.rows; row += round.step()) {
    const int rows = round.rows(row);
    BlockSums<T, kMeasuring, K::kSide> sums;
    if (round.row() < rows)
      round.each(seen.rows, row + round.row(), aligned, [&](auto side, int64_t place, int lane) {
        step_spot<K, kMeasuring, side>(seen, base, terms, place, lane, sums);
      });
    add_up<K>(sums, piece, row, room);
    if (threadIdx.x < rows)
      found[row - piece.row + threadIdx.x] = added_up(room, threadIdx.x * round.blocks(), base.sign);
    __syncthreads();
  }
}

// Sweep 0: what a step must know of all rows. For the slope it measures the last delta with the gradient. For the
// largest row it measures d.
template <template <class> class BaseOf, class Hyper, class K>
__device__ void survey(const Args& args) {
  __shared__ Shared<Room> of_room;
  Room& room = *of_room;
  __shared__ Shared<Setup<BaseOf<typename K::Number>, Hyper>> of_setup;
  auto& s = *of_setup;
  __shared__ int64_t places[K::kThreads];
  if (skips(args)) return;
  const int32_t owner = args.owners[blockIdx.x];
  const Entry& e = args.entries[owner];
  if (e.rule.survey == Survey::none) return;
  const int64_t program = blockIdx.x - e.program;
  set_up(args, owner, s);
  const bool slope = e.rule.survey == Survey::slope;
  Param seen;
  seen.rows = e.param.rows;
  if (slope)
    seen.param = e.param.delta, seen.grad = {args.grads[owner], e.param.grad.dtype};
  else
    seen.param = e.param.param, seen.working = e.param.working, seen.anchor = e.param.anchor;
  const Pieces pieces(e.param.rows);
  observe<K, Measuring::magnitudes>(seen, s.piece, s.base.sign, slope,
                                    args.found + e.found + pieces.first_found(program), room);
  if (!comes_last(args.counters + owner, e.programs, room)) return;
  const auto found = [&](int64_t row) { return found_of(args, e, row, pieces.parts()); };
  const int64_t rows = e.param.rows.count;
  if (slope) {
    const double sum = folded_by_all<K, double>(rows, room.numbers, [&](int64_t row) { return slope_of(found(row)); });
    if (threadIdx.x == 0) learn_by(e.rule.learning, e.learned, sum, s.t, s.terms);
  } else {
    const int64_t row = first_largest<K>(rows, room.numbers, places, [&](int64_t row) { return found(row).before; });
    if (threadIdx.x == 0) args.largest[owner] = row < 0 ? 0 : row;
  }
}

// The sum of the squares of all gradients.
template <class K>
__device__ void norm(const Args& args) {
  __shared__ Shared<Room> of_room;
  Room& room = *of_room;
  const int32_t owner = args.owners[blockIdx.x];
  const Entry& e = args.entries[owner];
  const int64_t program = blockIdx.x - e.program;
  Param seen;
  seen.rows = e.param.rows;
  seen.param = {args.grads[owner], e.param.param.dtype};
  observe<K, Measuring::squares>(seen, Pieces(seen.rows)[program], 1, false, args.found + e.found + program, room);
  if (!comes_last(args.counters + owner, e.programs, room)) return;
  const double of_tensor = folded_by_all<K, double>(e.programs, room.numbers,
                                                    [&](int64_t i) { return args.found[e.found + i].before; });
  if (threadIdx.x == 0) args.squared[owner] = of_tensor;
  if (!comes_last(args.counters + args.tensors, int32_t(args.tensors), room)) return;
  const double sum = folded_by_all<K, double>(args.tensors, room.numbers, [&](int64_t i) { return args.squared[i]; });
  if (threadIdx.x == 0) args.squared[args.tensors] = sum;
}

}  // namespace
}  // namespace robustft

// ---- names ----

using namespace robustft;

// kResident: programs that an SM is to hold. It bounds the registers of a thread.
#define ROBUSTFT_KERNEL(name, kind, kResident, ...) \
  extern "C" __global__ void __launch_bounds__(kind::kThreads, kResident) \
      name(const __grid_constant__ Args args) { __VA_ARGS__(args); }
#define ROBUSTFT_OF_BASE(name, Base, Hyper) \
  ROBUSTFT_KERNEL(step_##name##_any, Any, 2, step<Base, Hyper, Any, false>) \
  ROBUSTFT_KERNEL(step_##name##_any64, Any64, 1, step<Base, Hyper, Any64, false>) \
  ROBUSTFT_KERNEL(rows_##name##_any, Any, 2, step<Base, Hyper, Any, true>) \
  ROBUSTFT_KERNEL(rows_##name##_any64, Any64, 1, step<Base, Hyper, Any64, true>)
#define ROBUSTFT_OF_MOVING_BASE(name, Base, Hyper) \
  ROBUSTFT_KERNEL(step_##name##_f32, F32, 4, step<Base, Hyper, F32, false>) \
  ROBUSTFT_KERNEL(step_##name##_f32_anchor16, F32Anchor16, 4, step<Base, Hyper, F32Anchor16, false>) \
  ROBUSTFT_KERNEL(step_##name##_bf16, Bf16, 4, step<Base, Hyper, Bf16, false>) \
  ROBUSTFT_KERNEL(survey_##name##_any, Any, 2, survey<Base, Hyper, Any>) \
  ROBUSTFT_KERNEL(survey_##name##_any64, Any64, 1, survey<Base, Hyper, Any64>)
ROBUSTFT_OF_BASE(adamw, AdamW, AdamWHyper)
ROBUSTFT_OF_BASE(sgd, SGD, SGDHyper)
ROBUSTFT_OF_BASE(no_step, NoStep, NoStepHyper)
ROBUSTFT_OF_MOVING_BASE(adamw, AdamW, AdamWHyper)
ROBUSTFT_OF_MOVING_BASE(sgd, SGD, SGDHyper)
ROBUSTFT_KERNEL(pull_any, Any, 3, pull<Any>)
ROBUSTFT_KERNEL(pull_any64, Any64, 1, pull<Any64>)
ROBUSTFT_KERNEL(norm_any, Any, 3, norm<Any>)
ROBUSTFT_KERNEL(norm_any64, Any64, 1, norm<Any64>)
