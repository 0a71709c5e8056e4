// The sweeps: the kernels that are launched. A program is kTeams teams of threads, and works on one piece of a tensor.
// Each team adds up a block of kBlock elements. There a thread has lanes of its own, so that nothing moves between
// threads until the blocks are done.
#include "settle.cuh"

namespace robustft {
namespace {

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
    if (kRows) __syncthreads();  // before the next round
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

// Sweep 0: what a step must know of all rows, or of the whole tensor.
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
  const bool slope = e.rule.survey == Survey::slope, conflicts = e.rule.survey == Survey::conflict;
  const Param seen = surveyed(e.rule.survey, s.param);
  const Pieces pieces(e.param.rows);
  Measures* const to = args.found + e.found + pieces.first_found(program);
  if (conflicts)
    observe<K, Measuring::squares>(seen, s.piece, s.base.sign, true, to, room);
  else
    observe<K, Measuring::magnitudes>(seen, s.piece, s.base.sign, slope, to, room);
  if (!comes_last(args.counters + owner, e.programs, room)) return;
  if (conflicts) {
    const Measures total =
        folded_by_all<K, Measures>(e.programs, room.sums, [&](int64_t i) { return args.found[e.found + i]; });
    if (threadIdx.x == 0) args.factors[owner] = conflict(total, s.terms);
    return;
  }
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

extern "C" __global__ void __launch_bounds__(1) ROBUSTFT_SIGNATURE() {}

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
  ROBUSTFT_KERNEL(step_##name##_any8, Any8, 2, step<Base, Hyper, Any8, false>) \
  ROBUSTFT_KERNEL(rows_##name##_any8, Any8, 2, step<Base, Hyper, Any8, true>) \
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
