// Step: the native backend's prepared step. It holds its tensors as jobs. Each call takes their gradients.
#pragma once

#include "../table.h"
#include "schedule.h"

namespace robustft {

// `Hyper` determines the base.
template <class Hyper>
class NativeStep {
 public:
  NativeStep(BaseSweep<Hyper> sweep, const py::object& table)
      : sweep_(sweep), table_(table, at::kCPU, sizeof(Hyper) / sizeof(double)) {
    for (size_t i = 0; i < table_.size(); ++i) {
      Job& job = jobs_.emplace_back();
      job.rule = table_[i].rule;
      job.row = table_[i].row;
      job.param = table_.param_of(i);
    }
  }

  // The sum of the squares of all gradients. Its additions have an order of their own, which does not depend on the
  // threads.
  Tensor squared_norm(const std::optional<py::list>& given) const {
    const Gradients grads = table_.gradients(given);
    static const Rule rule = [] {
      Rule observe;
      observe.measuring = Measuring::squares;
      return observe;
    }();
    Tensors dense;  // alive until the sweep is done
    std::vector<Job> jobs(grads.size());
    std::vector<double> results(kResults * grads.size()), alphas(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
      dense.push_back(grads[i].is_non_overlapping_and_dense() ? grads[i] : grads[i].contiguous());
      Job& job = jobs[i];
      job.param.rows = rows_of(dense[i], false);
      TORCH_CHECK(place_in_dtypes(dense[i]) < kFloats, "robustft: grads[", i, "] must be ", names_of(kAny), ", got ",
                  described(dense[i]));
      job.param.param = {dense[i].data_ptr(), DType(place_in_dtypes(dense[i]))};
      job.rule = &rule, job.results = &results[kResults * i], job.alphas = &alphas[i];
    }
    py::gil_scoped_release release;
    robustft::run(jobs, [](const Job& job, const PerRow& alpha, const Piece& piece, Measuring measuring, Measures* found) {
      sweeps().no_step(job.param, {}, 0, alpha, piece, measuring, found);
    });
    const double sum = folded<double>(int64_t(jobs.size()), [&](int64_t i) { return recorded(jobs[i], 0).before; });
    return at::scalar_tensor(sum, at::kDouble);
  }

  void run(const std::optional<py::list>& given, const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
    if (found_inf && found_inf->item<double>() != 0) return;
    const double scale = grad_scale ? grad_scale->item<double>() : 1;
    const Gradients grads = table_.gradients(given);
    const bool none = grads.empty() && !kMoves;
    if (!none) table_.check_count(grads.size());
    std::vector<Tensor> relaid(jobs_.size());  // alive until the sweeps are done
    for (size_t i = 0; i < jobs_.size(); ++i) {
      expect_near(i, grads, none);
      bind(i, scale);
      jobs_[i].graded = !none;
      jobs_[i].param.grad = none ? Buffer{} : table_.grad(i, grads[i], relaid[i]);
    }

    for (size_t i = 0; i < jobs_.size(); ++i) {
      if (i + 8 < jobs_.size()) expect(table_[i + 8].param), __builtin_prefetch(counts_[i + 8], 1);
      if (kMoves || jobs_[i].rule->pulls) bump_version(table_[i].param);
      if (kMoves && counts_[i]) *counts_[i] += 1;
    }
    py::gil_scoped_release release;
    robustft::run(jobs_, [this](const Job& job, const PerRow& alpha, const Piece& piece, Measuring measuring,
                                Measures* found) {
      sweep_(job.param, rows()[job.row], job.t, alpha, piece, measuring, found);
    });
  }

 private:
  static constexpr bool kMoves = !std::is_same_v<Hyper, NoStepHyper>;

  // For thousands of small tensors. Their headers are scattered, and waiting for them would cost as much as the step.
  void expect_near(size_t i, const Gradients& grads, bool none) const {
    const auto each = [](const Held& held, auto&& expects) {
      for (const Tensor* tensor : {&held.param, &held.anchor, &held.state[0], &held.state[1], &held.step}) expects(*tensor);
    };
    if (i + 8 < jobs_.size()) each(table_[i + 8], [](const Tensor& tensor) { expect(tensor); });
    if (i + 4 < jobs_.size()) {
      each(table_[i + 4], [](const Tensor& tensor) { expect_storage(tensor); });
      if (!none) expect(grads[i + 4]);
    }
    if (i + 2 < jobs_.size() && !none) expect_storage(grads[i + 2]);
  }

  const Hyper* rows() const { return static_cast<const Hyper*>(table_.hyper.const_data_ptr()); }

  void bind(size_t i, double scale) {
    Job& job = jobs_[i];
    const Held& held = table_[i];
    const Hyper& h = rows()[job.row];
    job.terms = terms_of(h);
    counts_[i] = held.step.defined() ? held.step.template data_ptr<float>() : nullptr;
    job.t = counts_[i] ? *counts_[i] + kMoves : 0;
    job.results = table_.results.data_ptr<double>() + kResults * held.first;
    job.alphas = table_.alphas.data_ptr<double>() + held.first;
    job.learned = held.learned.defined() ? held.learned.template data_ptr<double>() : nullptr;
    job.param.sign = sign_of(h, scale);
    job.param.penalty = job.rule->penalty(h.strength);
    table_.bind(i, job.param);
  }

  BaseSweep<Hyper> sweep_;
  const Table table_;
  std::vector<Job> jobs_;
  std::vector<float*> counts_ = std::vector<float*>(table_.size());  // of steps, where they are now
};

}  // namespace robustft
