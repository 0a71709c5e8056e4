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

// One thread finishes a tensor up to this size alone. Small tensors share a task.
constexpr int64_t kWhole = 2 * kChunk;
// The most short rows that are stepped and then pulled while they are in the cache. They are a chunk at most.
constexpr int64_t kBatchRows = 512;
// The most pieces that a thread takes at once. Each time a stream breaks off, the prefetchers lose it.
constexpr int64_t kRun = 8;
// A thread takes several pieces at once only if each thread still has at least this many turns.
constexpr int64_t kTurns = 32;

Piece all_of(const Rows& rows) { return {0, rows.count, 0, rows.length}; }

PerRow alphas_of(const Job& job) { return {job.alphas, !job.rule->by_rows}; }

void record(const Job& job, int64_t segment, const Measures& m, double alpha) {
  robustft::record(job.results, job.alphas, segment, m, alpha, job.graded);
}

void fold(std::vector<Measures>& found, int64_t parts) {
  if (parts == 1) return;
  for (size_t row = 0; row < found.size() / parts; ++row)
    found[row] = folded<Measures>(parts, [&](int64_t part) { return found[row * parts + part]; });
}

// Decides the alphas of all segments from their measures.
void decide(const Job& job, const std::vector<Measures>& found) {
  const int64_t n = job.segments();
  Measures largest;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    finite &= std::isfinite(row_norm(found[i]));
    if (row_norm(found[i]) > row_norm(largest)) largest = found[i];
  }
  const double tied = job.rule->tied && finite ? alpha_of(job.rule->alpha, largest, job.terms) : 1;
  for (int64_t i = 0; i < n; ++i)
    record(job, i, found[i], job.rule->tied ? tied : alpha_of(job.rule->alpha, found[i], job.terms));
}

void pull(const Job& job, const Piece& piece) {
  sweeps().no_step(job.param, {}, job.t, alphas_of(job), piece, Measuring::none, nullptr);
}

// For rows that do not depend on each other. Steps, measures, decides and pulls a few at a time, in the cache.
void step_and_pull(const Job& job, const StepSweep& step, const Piece& piece) {
  const int64_t batch = std::clamp<int64_t>(kChunk / std::max<int64_t>(1, piece.end - piece.begin), 1, kBatchRows);
  Measures found[kBatchRows];
  for (int64_t row = piece.row; row < piece.row + piece.rows; row += batch) {
    const Piece few{row, std::min(batch, piece.row + piece.rows - row), piece.begin, piece.end};
    step(job, {}, few, job.rule->measuring, found);
    for (int64_t i = 0; i < few.rows; ++i) record(job, row + i, found[i], alpha_of(job.rule->alpha, found[i], job.terms));
    pull(job, few);
  }
}

// Sweep 0.
void survey(const Job& job, const Piece& piece, Measures* found) {
  const Param seen = surveyed(job.rule->survey, job.param);
  sweeps().no_step(seen, {}, 0, {}, piece, measuring_of(job.rule->survey), found);
}

void conclude_survey(Job& job, const std::vector<Measures>& found) {
  const int64_t rows = job.param.rows.count;
  if (job.rule->survey == Survey::slope) {
    const double slope = folded<double>(rows, [&](int64_t row) { return slope_of(found[row]); });
    learn_by(job.rule->learning, job.learned, slope, job.t, job.terms);
    job.terms.radius = job.learned[0];
  } else if (job.rule->survey == Survey::conflict) {
    job.param.penalty.linear = conflict(found[0], job.terms);
  } else {
    int64_t largest = 0;
    double most = -1;  // a row of nan is never the largest
    for (int64_t i = 0; i < rows; ++i)
      if (found[i].before > most) largest = i, most = found[i].before;
    job.param.penalty.row = largest;
  }
}

// Does what is left once all segments are decided.
void finish(const Job& job) {
  if (!job.learned || job.segments() == 0) return;
  double largest = 0;
  for (int64_t i = 0; i < job.segments(); ++i) {
    const double n = row_norm(recorded(job, i)) + kRowEps;
    if (!std::isfinite(n)) return;
    largest = std::max(largest, n);
  }
  job.learned[0] = std::min(job.learned[0], largest);
}

enum class Kind : uint8_t { whole, survey, step };

// What a thread draws: several whole jobs, or the first sweep over some pieces of one job.
struct Task {
  Kind kind;
  int first, last;
  int64_t begin, end;
};

// Pieces that any thread may take. Each piece is taken once.
class Claims {
 public:
  explicit Claims(int64_t n) : taken_(n), left_(n) {}

  bool any() const { return left_.load(std::memory_order_relaxed) > 0; }
  bool take(int64_t i) {
    if (taken_[i].exchange(true, std::memory_order_relaxed)) return false;
    left_.fetch_sub(1, std::memory_order_relaxed);
    return true;
  }

 private:
  std::vector<std::atomic<bool>> taken_;
  std::atomic<int64_t> left_;
};

// What threads tell each other about a tensor that they work on together.
struct Progress {
  std::vector<Measures> found;
  std::atomic<int64_t> unsurveyed, unstepped;  // pieces
  std::atomic<bool> surveyed{false}, decided{false};
  Claims steps, pulls;

  explicit Progress(const Pieces& pieces)
      : found(pieces.found()), unsurveyed(pieces.count()), unstepped(pieces.count()), steps(pieces.count()),
        pulls(pieces.count()) {}
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
      Worker worker{*this};
      for (size_t i; (i = ticket_.fetch_add(1, std::memory_order_relaxed)) < tasks_.size();) worker.start(tasks_[i]);
      worker.finish();
    };
    if (tasks_.size() == 1)
      drain(0, 1);
    else
      at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks_.size()), 1, drain);
  }

 private:
  // A thread goes on with its own pieces as soon as the tensor's other pieces are as far. It steps what it surveyed,
  // and pulls what it stepped. It takes the last pieces first, since they are still in its own cache. It waits only
  // when nothing is left to draw. Then it waits for what running threads have drawn, the earliest tensor first. This
  // cannot deadlock.
  struct Worker {
    Run& run;
    std::deque<Task> surveyed = {}, stepped = {};

    void start(const Task& task) {
      if (task.kind == Kind::whole) {
        for (int j = task.first; j < task.last; ++j) run.whole(run.jobs_[j]);
      } else if (task.kind == Kind::survey) {
        for (int64_t i = task.begin; i < task.end; ++i) run.survey_piece(task.first, i);
        surveyed.push_back(task);
      } else {
        step(task);
      }
      while (run.is_decided(stepped)) pull();
      while (run.is_surveyed(surveyed)) step_surveyed();
    }

    void finish() {
      for (; !surveyed.empty(); step_surveyed()) wait_for(run.progress_[surveyed.front().first]->surveyed);
      run.help_to_step();
      for (; !stepped.empty(); pull()) wait_for(run.progress_[stepped.front().first]->decided);
      run.help_to_pull();
    }

   private:
    void step(const Task& task) {
      for (int64_t i = task.begin; i < task.end; ++i) run.step_piece(task.first, i);
      if (run.pulls_later(task.first)) stepped.push_back(task);
    }
    void step_surveyed() {
      for (const Task& task : first_job(surveyed)) step(task);
    }
    void pull() {
      for (const Task& task : first_job(stepped))
        for (int64_t i = task.end; i-- > task.begin;) run.pull_piece(task.first, i);
    }

    // Removes the tasks of the first job, and returns them in reverse order.
    static std::vector<Task> first_job(std::deque<Task>& tasks) {
      std::vector<Task> taken;
      for (const int job = tasks.front().first; !tasks.empty() && tasks.front().first == job; tasks.pop_front())
        taken.push_back(tasks.front());
      std::reverse(taken.begin(), taken.end());
      return taken;
    }
  };

  bool is_surveyed(const std::deque<Task>& tasks) const {
    return !tasks.empty() && progress_[tasks.front().first]->surveyed.load(std::memory_order_acquire);
  }
  bool is_decided(const std::deque<Task>& tasks) const {
    return !tasks.empty() && progress_[tasks.front().first]->decided.load(std::memory_order_acquire);
  }

  void plan() {
    int64_t total = 0, gathered = 0;
    for (const Job& job : jobs_) total += job.param.rows.numel();
    const int64_t run = std::clamp<int64_t>(total / (at::get_num_threads() * kTurns * kChunk), 1, kRun);
    for (int j = 0; j < int(jobs_.size()); ++j) {
      const int64_t numel = jobs_[j].param.rows.numel();
      if (numel <= kWhole) {
        const bool joins = !tasks_.empty() && tasks_.back().kind == Kind::whole && gathered + numel <= kWhole;
        gathered = joins ? gathered + numel : numel;
        if (joins)
          tasks_.back().last = j + 1;
        else
          tasks_.push_back({Kind::whole, j, j + 1, 0, 0});
        continue;
      }
      const Pieces pieces(jobs_[j].param.rows);
      if (surveys(j) || jobs_[j].rule->measuring != Measuring::none) progress_[j] = std::make_unique<Progress>(pieces);
      const Kind kind = surveys(j) ? Kind::survey : Kind::step;
      for (int64_t i = 0; i < pieces.count(); i += run)
        tasks_.push_back({kind, j, j + 1, i, std::min(i + run, pieces.count())});
    }
  }

  bool surveys(int j) const { return jobs_[j].rule->survey != Survey::none; }
  bool pulls_later(int j) const {
    return jobs_[j].rule->measuring != Measuring::none && !jobs_[j].rule->pulls_at_once(Pieces(jobs_[j].param.rows));
  }

  void survey_piece(int j, int64_t i) {
    const Pieces pieces(jobs_[j].param.rows);
    Progress& progress = *progress_[j];
    survey(jobs_[j], pieces[i], &progress.found[pieces.first_found(i)]);
    if (progress.unsurveyed.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    fold(progress.found, pieces.parts());
    conclude_survey(jobs_[j], progress.found);
    progress.surveyed.store(true, std::memory_order_release);
  }

  void step_piece(int j, int64_t i) {
    Job& job = jobs_[j];
    const Pieces pieces(job.param.rows);
    Progress* const progress = progress_[j].get();
    if (surveys(j) && !progress->steps.take(i)) return;  // a helper has taken it
    if (job.rule->measuring == Measuring::none)
      return step_(job, alphas_of(job), pieces[i], Measuring::none, nullptr);
    if (job.rule->pulls_at_once(pieces))
      step_and_pull(job, step_, pieces[i]);
    else
      step_(job, {}, pieces[i], job.rule->measuring, &progress->found[pieces.first_found(i)]);
    if (progress->unstepped.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    if (pulls_later(j)) {  // the thread that finishes the last piece folds all of them, in their order
      fold(progress->found, pieces.parts());
      decide(job, progress->found);
    }
    finish(job);
    progress->decided.store(true, std::memory_order_release);
  }

  void pull_piece(int j, int64_t i) {
    if (progress_[j]->pulls.take(i)) pull(jobs_[j], Pieces(jobs_[j].param.rows)[i]);
  }

  // Takes over pieces that other threads began and have not gone on with. So a thread that the system has suspended
  // does not make all others wait.
  void help_to_step() {
    for (int j = 0; j < int(jobs_.size()); ++j) {
      if (!progress_[j] || !surveys(j)) continue;
      wait_for(progress_[j]->surveyed);
      for (int64_t i = 0; progress_[j]->steps.any() && i < Pieces(jobs_[j].param.rows).count(); ++i) step_piece(j, i);
    }
  }
  void help_to_pull() {
    for (int j = 0; j < int(jobs_.size()); ++j) {
      if (!progress_[j] || !pulls_later(j)) continue;
      wait_for(progress_[j]->decided);
      for (int64_t i = 0; progress_[j]->pulls.any() && i < Pieces(jobs_[j].param.rows).count(); ++i) pull_piece(j, i);
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
    if (job.rule->measuring == Measuring::none) return step_(job, alphas_of(job), all, Measuring::none, nullptr);
    if (job.rule->tied) {
      step_(job, {}, all, job.rule->measuring, found.data());
      decide(job, found);
      pull(job, all);
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
      record(job, i, Measures::filled(nan), job.rule->given ? job.alphas[i] : alpha_of(job.rule->alpha, {}, job.terms));
  }
  Run(jobs, step)();
}

}  // namespace robustft
