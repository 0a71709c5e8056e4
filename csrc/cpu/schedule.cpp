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

// Segments up to this size are finished by one thread while they are in its cache; small ones share a task.
constexpr int64_t kWhole = 2 * kChunk;

enum class Kind : uint8_t { whole, measure, pull };

struct Task {
  Kind kind;
  int first, last;     // jobs
  int64_t begin, end;  // elements of the one job, where it is not whole
};

// What the threads tell each other about a segment that several of them work on.
struct Progress {
  std::vector<Measures> partials;  // one for each chunk
  std::atomic<int64_t> missing;    // chunks
  std::atomic<bool> decided{false};

  explicit Progress(int64_t chunks) : partials(chunks), missing(chunks) {}
};

int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

void decide(const Job& job, const Measures& total) {
  job.measures[0] = total.grad_dot_delta;
  job.measures[1] = total.delta_sq;
  job.measures[2] = total.gain;
  *job.alpha = job.rule.alpha(total, job.strength, job.lr);
}

class Run {
 public:
  Run(const std::vector<Job>& jobs, const BaseSweep& base_sweep) : jobs_(jobs), base_sweep_(base_sweep), progress_(jobs.size()) {
    plan();
  }

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
  // Tasks are taken in this order, so an earlier one is never waiting for a thread: a pull that waits for the
  // chunks before it cannot deadlock. The pull of a segment follows its measures by one round of the threads,
  // and goes backwards: what was measured last is still in the cache.
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
      const int64_t numel = jobs_[j].segment.numel;
      if (numel <= kWhole) {
        const bool joins = !tasks_.empty() && tasks_.back().kind == Kind::whole && gathered + numel <= kWhole;
        gathered = joins ? gathered + numel : numel;
        if (joins)
          tasks_.back().last = j + 1;
        else
          emit({Kind::whole, j, j + 1, 0, 0});
        continue;
      }
      for (int64_t at = 0; at < numel; at += kChunk)
        emit({Kind::measure, j, j + 1, at, std::min(at + kChunk, numel)});
      if (!jobs_[j].rule.measured) continue;
      progress_[j] = std::make_unique<Progress>(chunks_of(numel));
      for (int64_t c = chunks_of(numel); c-- > 0;)
        pulls.push_back({tasks_.size() + lag, {Kind::pull, j, j + 1, c * kChunk, std::min((c + 1) * kChunk, numel)}});
    }
    for (const auto& [due, task] : pulls) tasks_.push_back(task);
  }

  void work(const Task& task) {
    const Job& job = jobs_[task.first];
    switch (task.kind) {
      case Kind::whole:
        for (int j = task.first; j < task.last; ++j) whole(jobs_[j]);
        break;
      case Kind::measure:
        if (job.rule.measured)
          measure(job, *progress_[task.first], task.begin, task.end);
        else
          base_sweep_(job, *job.alpha, task.begin, task.end, nullptr);
        break;
      case Kind::pull:
        for (int spins = 0; !progress_[task.first]->decided.load(std::memory_order_acquire);)
          if (++spins > 64) std::this_thread::yield();
        if (*job.alpha != 1) sweeps().pull(job.segment, job.t, *job.alpha, task.begin, task.end);
        break;
    }
  }

  void whole(const Job& job) {
    const int64_t numel = job.segment.numel;
    if (!job.rule.measured) return base_sweep_(job, *job.alpha, 0, numel, nullptr);
    Measures total;
    for (int64_t at = 0; at < numel; at += kChunk) {
      Measures partial;
      base_sweep_(job, 1, at, std::min(at + kChunk, numel), &partial);
      add(total, partial);
    }
    decide(job, total);
    if (*job.alpha != 1) sweeps().pull(job.segment, job.t, *job.alpha, 0, numel);
  }

  void measure(const Job& job, Progress& progress, int64_t begin, int64_t end) {
    base_sweep_(job, 1, begin, end, &progress.partials[begin / kChunk]);
    if (progress.missing.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    Measures total;  // the last chunk to finish folds all of them, in their order
    for (const Measures& partial : progress.partials) add(total, partial);
    decide(job, total);
    progress.decided.store(true, std::memory_order_release);
  }

  const std::vector<Job>& jobs_;
  const BaseSweep& base_sweep_;
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

void run(const std::vector<Job>& jobs, const BaseSweep& base_sweep) {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  for (const Job& job : jobs) {
    if (job.rule.measured) continue;
    std::fill_n(job.measures, 3, nan);
    *job.alpha = job.rule.alpha({}, job.strength, job.lr);
  }
  Run(jobs, base_sweep)();
}

}  // namespace robustft
