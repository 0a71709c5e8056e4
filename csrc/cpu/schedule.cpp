#include "schedule.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <atomic>
#include <deque>
#include <limits>
#include <memory>
#include <thread>

namespace robustft {
namespace {

constexpr int64_t kWhole = 2 * kChunk;  // tensors up to this size are finished by one thread; small ones share a task
constexpr int64_t kBatch = 4096;        // elements of short rows that are stepped and then pulled, in its cache
constexpr int64_t kBatchRows = 64;

// A tensor in pieces of at most kChunk elements: several whole rows, or a part of one.
class Pieces {
 public:
  explicit Pieces(const Rows& rows)
      : rows_(rows),
        together_(std::max<int64_t>(1, kChunk / std::max<int64_t>(1, rows.length))),
        parts_(std::max<int64_t>(1, (rows.length + kChunk - 1) / kChunk)) {}

  bool split() const { return parts_ > 1; }
  int64_t parts() const { return parts_; }
  int64_t count() const { return split() ? rows_.count * parts_ : (rows_.count + together_ - 1) / together_; }
  int64_t found() const { return rows_.count * parts_; }  // how many sums all pieces give
  int64_t first_found(int64_t i) const { return split() ? i : i * together_; }
  Piece operator[](int64_t i) const {
    if (!split()) return {i * together_, std::min(together_, rows_.count - i * together_), 0, rows_.length};
    const int64_t begin = i % parts_ * kChunk;
    return {i / parts_, 1, begin, std::min(begin + kChunk, rows_.length)};
  }

 private:
  Rows rows_;
  int64_t together_, parts_;
};

Piece all_of(const Rows& rows) { return {0, rows.count, 0, rows.length}; }

PerRow alpha_of(const Job& job) { return {job.alphas, !job.rule->rows}; }

void record(const Job& job, int64_t segment, const Measures& m, double alpha) {
  job.alphas[segment] = alpha;
  double* const to = job.measures + kMeasures * segment;
  to[0] = job.graded ? m.grad_dot_delta : std::numeric_limits<double>::quiet_NaN();
  to[1] = m.before;
  to[2] = m.gain;
  to[3] += alpha != 1;
}

void fold(std::vector<Measures>& found, int64_t parts) {
  if (parts == 1) return;
  for (size_t row = 0; row < found.size() / parts; ++row) {
    Measures sum;
    for (int64_t part = 0; part < parts; ++part) add(sum, found[row * parts + part]);
    found[row] = sum;
  }
}

// From the measures of all segments to their alphas.
void decide(const Job& job, const std::vector<Measures>& found) {
  const int64_t n = job.segments();
  Measures largest;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    finite &= std::isfinite(row_norm(found[i]));
    if (row_norm(found[i]) > row_norm(largest)) largest = found[i];
  }
  const double tied = job.rule->tied && finite ? job.rule->alpha(largest, job.terms) : 1;
  for (int64_t i = 0; i < n; ++i)
    record(job, i, found[i], job.rule->tied ? tied : job.rule->alpha(found[i], job.terms));
}

// Rows that need nothing of each other: step, measure, decide and pull a few at a time, while they are in the cache.
void step_and_pull(const Job& job, const StepSweep& step, const Piece& piece) {
  const int64_t batch = std::clamp<int64_t>(kBatch / std::max<int64_t>(1, piece.end - piece.begin), 1, kBatchRows);
  Measures found[kBatchRows];
  for (int64_t row = piece.row; row < piece.row + piece.rows; row += batch) {
    const Piece few{row, std::min(batch, piece.row + piece.rows - row), piece.begin, piece.end};
    step(job, {}, few, job.rule->measuring, found);
    for (int64_t i = 0; i < few.rows; ++i) record(job, row + i, found[i], job.rule->alpha(found[i], job.terms));
    sweeps().pull(job.param, job.t, alpha_of(job), few);
  }
}

// Sweep 0: of the delta with the gradient, or of d.
void survey(const Job& job, const Piece& piece, Measures* found) {
  Param seen;
  seen.rows = job.param.rows;
  seen.sign = job.param.sign;
  if (job.rule->survey == Survey::slope)
    seen.param = job.param.delta, seen.grad = job.param.grad;
  else
    seen.param = job.param.param, seen.working = job.param.working, seen.anchor = job.param.anchor;
  sweeps().still(seen, {}, 0, {}, piece, Measuring::magnitudes, found);
}

void conclude_survey(Job& job, const std::vector<Measures>& found) {
  const int64_t rows = job.param.rows.count;
  if (job.rule->survey == Survey::slope) {
    double slope = 0;
    for (int64_t i = 0; i < rows; ++i) slope += found[i].grad_dot_delta / (found[i].before + kRowEps);
    learn(*job.radius, slope, job.t, job.radius_hyper);
    job.terms.radius = job.radius->value;
  } else {
    int64_t largest = 0;
    for (int64_t i = 1; i < rows; ++i)
      if (found[i].before > found[largest].before) largest = i;
    job.param.penalty.row = largest;
  }
}

// What is left once all segments are decided.
void finish(const Job& job) {
  if (!job.radius || job.segments() == 0) return;
  double largest = 0;
  for (int64_t i = 0; i < job.segments(); ++i) {
    const double n = job.measures[kMeasures * i + 1] + job.measures[kMeasures * i + 2] + kRowEps;
    if (!std::isfinite(n)) return;
    largest = std::max(largest, n);
  }
  job.radius->value = std::min(job.radius->value, largest);
}

enum class Kind : uint8_t { whole, survey, step, pull };

struct Task {
  Kind kind;
  int first, last;  // jobs
  int64_t piece;    // of the one job, where it is not whole
};

// What the threads tell each other about a tensor that several of them work on.
struct Progress {
  std::vector<Measures> found;
  std::atomic<int64_t> unsurveyed, unstepped;  // pieces
  std::atomic<bool> surveyed{false}, decided{false};

  explicit Progress(const Pieces& pieces)
      : found(pieces.found()), unsurveyed(pieces.count()), unstepped(pieces.count()) {}
};

void wait_for(const std::atomic<bool>& flag) {
  for (int spins = 0; !flag.load(std::memory_order_acquire);)
    if (++spins > 64) std::this_thread::yield();
}

class Run {
 public:
  Run(std::vector<Job>& jobs, const StepSweep& step) : jobs_(jobs), step_(step), progress_(jobs.size()) { plan(); }

  void operator()() {
    const auto drain = [this](int64_t, int64_t) {
      for (size_t i; (i = ticket_.fetch_add(1, std::memory_order_relaxed)) < tasks_.size();) work(tasks_[i]);
    };
    if (tasks_.size() == 1)
      drain(0, 1);
    else
      at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks_.size()), 1, drain);
  }

 private:
  // Tasks are taken in this order, so an earlier one is never waiting for a thread: a task that waits for those
  // before it cannot deadlock. The pull of a tensor follows its measures by one round of the threads, and goes
  // backwards: what was measured last is still in the cache.
  void plan() {
    const size_t lag = at::get_num_threads();
    std::deque<std::pair<size_t, Task>> pulls;  // with the number of tasks after which each is due
    const auto emit = [&](const Task& task) {
      tasks_.push_back(task);
      for (; !pulls.empty() && pulls.front().first <= tasks_.size(); pulls.pop_front())
        tasks_.push_back(pulls.front().second);
    };
    int64_t gathered = 0;
    for (int j = 0; j < int(jobs_.size()); ++j) {
      const int64_t numel = jobs_[j].param.rows.numel();
      if (numel <= kWhole) {
        const bool joins = !tasks_.empty() && tasks_.back().kind == Kind::whole && gathered + numel <= kWhole;
        gathered = joins ? gathered + numel : numel;
        if (joins)
          tasks_.back().last = j + 1;
        else
          emit({Kind::whole, j, j + 1, 0});
        continue;
      }
      const Rule& rule = *jobs_[j].rule;
      const Pieces pieces(jobs_[j].param.rows);
      if (rule.survey != Survey::none || rule.measuring != Measuring::none)
        progress_[j] = std::make_unique<Progress>(pieces);
      if (rule.survey != Survey::none)
        for (int64_t i = 0; i < pieces.count(); ++i) emit({Kind::survey, j, j + 1, i});
      for (int64_t i = 0; i < pieces.count(); ++i) emit({Kind::step, j, j + 1, i});
      if (rule.measuring != Measuring::none && !pulls_at_once(jobs_[j], pieces))
        for (int64_t i = pieces.count(); i-- > 0;) pulls.push_back({tasks_.size() + lag, {Kind::pull, j, j + 1, i}});
    }
    for (const auto& [due, task] : pulls) tasks_.push_back(task);
  }

  static bool pulls_at_once(const Job& job, const Pieces& pieces) {
    return job.rule->rows && !job.rule->tied && !pieces.split();
  }

  void work(const Task& task) {
    if (task.kind == Kind::whole) {
      for (int j = task.first; j < task.last; ++j) whole(jobs_[j]);
      return;
    }
    Job& job = jobs_[task.first];
    const Pieces pieces(job.param.rows);
    const Piece piece = pieces[task.piece];
    Progress* const progress = progress_[task.first].get();
    switch (task.kind) {
      case Kind::survey:
        survey(job, piece, &progress->found[pieces.first_found(task.piece)]);
        if (progress->unsurveyed.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
        fold(progress->found, pieces.parts());
        conclude_survey(job, progress->found);
        return progress->surveyed.store(true, std::memory_order_release);
      case Kind::step:
        if (job.rule->survey != Survey::none) wait_for(progress->surveyed);
        if (job.rule->measuring == Measuring::none)
          return step_(job, alpha_of(job), piece, Measuring::none, nullptr);
        if (pulls_at_once(job, pieces))
          step_and_pull(job, step_, piece);
        else
          step_(job, {}, piece, job.rule->measuring, &progress->found[pieces.first_found(task.piece)]);
        if (progress->unstepped.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
        if (!pulls_at_once(job, pieces)) {  // the last piece to finish folds all of them, in their order
          fold(progress->found, pieces.parts());
          decide(job, progress->found);
        }
        finish(job);
        return progress->decided.store(true, std::memory_order_release);
      default:
        wait_for(progress->decided);
        sweeps().pull(job.param, job.t, alpha_of(job), piece);
    }
  }

  void whole(Job& job) {
    const Piece all = all_of(job.param.rows);
    static thread_local std::vector<Measures> found;
    found.resize(all.rows);
    if (job.rule->survey != Survey::none) {
      survey(job, all, found.data());
      conclude_survey(job, found);
    }
    if (job.rule->measuring == Measuring::none) return step_(job, alpha_of(job), all, Measuring::none, nullptr);
    if (job.rule->tied) {
      step_(job, {}, all, job.rule->measuring, found.data());
      decide(job, found);
      sweeps().pull(job.param, job.t, alpha_of(job), all);
    } else {
      step_and_pull(job, step_, all);
    }
    finish(job);
  }

  std::vector<Job>& jobs_;
  const StepSweep& step_;
  std::vector<std::unique_ptr<Progress>> progress_;
  std::vector<Task> tasks_;
  std::atomic<size_t> ticket_{0};
};

}  // namespace

const Sweeps& sweeps() {
  static const Sweeps& chosen = []() -> const Sweeps& {
#ifdef __x86_64__
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return kAvx512;
    if (capability != "DEFAULT" && __builtin_cpu_supports("avx2")) return kAvx2;
#endif
    return kBaseline;
  }();
  return chosen;
}

void run(std::vector<Job>& jobs, const StepSweep& step) {
  for (const Job& job : jobs) {
    if (job.rule->measuring != Measuring::none) continue;
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    for (int64_t i = 0; i < job.segments(); ++i)
      record(job, i, {nan, nan, nan}, job.rule->given ? job.alphas[i] : job.rule->alpha({}, job.terms));
  }
  Run(jobs, step)();
}

}  // namespace robustft
