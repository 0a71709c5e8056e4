// The native backend as Python sees it: a prepared step holds its tensors as jobs; run() takes the gradients.
#include <torch/extension.h>

#include "cpu/schedule.h"

namespace robustft {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default: TORCH_CHECK(false, "robustft: the native backend does not take ", tensor.scalar_type());
  }
}

// Strides of dimensions of size 1 say nothing about memory.
bool same_layout(const Tensor& a, const Tensor& b) {
  if (!a.sizes().equals(b.sizes())) return false;
  if (a.numel() == 0) return true;
  for (int64_t k = 0; k < a.dim(); ++k)
    if (a.size(k) != 1 && a.stride(k) != b.stride(k)) return false;
  return true;
}

// A tensor as rows of dimension 0, or as one; it is dense.
Rows rows_of(const Tensor& tensor, bool by_rows) {
  const int64_t n = tensor.numel(), count = by_rows && tensor.dim() > 1 ? tensor.size(0) : 1;
  const int64_t length = count ? n / count : 0;
  return {count, length, n && count > 1 ? tensor.stride(0) : length};
}

Buffer buffer_of(const Tensor& tensor, const Tensor& param, const char* name) {
  TORCH_CHECK(tensor.has_storage(), "robustft: a tensor of ", name, " has no memory of its own");
  TORCH_CHECK(tensor.device().is_cpu() && tensor.layout() == at::kStrided && same_layout(tensor, param),
              "robustft: a tensor of ", name, " has not the device, shape and strides of its param");
  return {tensor.data_ptr(), dtype_of(tensor)};
}

// A list whose entries are taken one by one, because not every parameter has one.
template <class T>
class Feed {
 public:
  Feed(const std::vector<T>& list, const char* name) : list_(list), name_(name) {}

  const T& next() {
    TORCH_CHECK(at_ < list_.size(), "robustft: ", name_, " has ", list_.size(), " entries, too few for the groups");
    return list_[at_++];
  }
  void check_all_taken() const {
    TORCH_CHECK(at_ == list_.size(), "robustft: ", name_, " has ", list_.size(), " entries; the groups take ", at_);
  }

 private:
  const std::vector<T>& list_;
  const char* name_;
  size_t at_ = 0;
};

void check_table(const Tensor& table, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK(table.device().is_cpu() && table.scalar_type() == at::kDouble && table.is_contiguous() &&
                  table.sizes().equals(sizes),
              "robustft: ", name, " must be a contiguous float64 CPU tensor of shape ", sizes);
}

void bump_version(const Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

// The tensors of one launch. `Hyper` tells the base; a group's row says which lists its parameters draw from.
template <class Hyper>
class PreparedStep {
 public:
  // What each list of moments is called, and whether the parameters of a group with this row have an entry in it.
  struct StateList {
    const char* name;
    bool (*drawn)(const Hyper&);
  };

  // states: as `lists` has them, then deltas, radius_states and masters.
  PreparedStep(BaseSweep<Hyper> sweep, const std::vector<StateList>& lists, bool (*counted)(const Hyper&), Tensors params,
               const Tensors& anchors, const std::vector<Tensors>& states, const Tensors& steps, Tensor measures,
               Tensor alphas, Tensor hyper, const std::vector<int64_t>& group_sizes,
               const std::vector<std::string>& rules, const std::vector<int64_t>& seeds)
      : sweep_(sweep), measures_(std::move(measures)), alphas_(std::move(alphas)), hyper_(std::move(hyper)) {
    const int64_t groups = group_sizes.size();
    check_table(hyper_, {groups, int64_t(sizeof(Hyper) / sizeof(double))}, "hyper");
    TORCH_CHECK(int64_t(rules.size()) == groups, "robustft: ", groups, " groups but ", rules.size(), " rules");

    Feed<Tensor> param_feed(params, "params"), anchor_feed(anchors, "anchors"), step_feed(steps, "steps");
    std::vector<Feed<Tensor>> state_feeds;
    for (size_t s = 0; s < lists.size(); ++s) state_feeds.emplace_back(states[s], lists[s].name);
    Feed<Tensor> delta_feed(states[lists.size()], "deltas"), radius_feed(states[lists.size() + 1], "radius_states");
    Feed<Tensor> master_feed(states[lists.size() + 2], "masters");
    TORCH_CHECK(seeds.empty() || seeds.size() == params.size(), "robustft: seeds has ", seeds.size(), " entries for ",
                params.size(), " params; give one each, or none");
    int64_t segments = 0;
    for (int row = 0; row < groups; ++row) {
      const Rule& rule = rule_of(rules[row]);
      const bool learns = rule.survey == Survey::slope;
      const Hyper& h = rows()[row];
      for (int64_t k = 0; k < group_sizes[row]; ++k) {
        const int64_t i = jobs_.size();
        Held& held = held_.emplace_back();
        held.param = param_feed.next();
        TORCH_CHECK(held.param.is_non_overlapping_and_dense(), "robustft: params[", i, "] is not dense");
        if (h.anchored) held.anchor = anchor_feed.next();
        for (size_t s = 0; s < lists.size(); ++s)
          if (lists[s].drawn(h)) held.state[s] = state_feeds[s].next();
        if (rule.tracks) held.delta = delta_feed.next();
        if (learns) {
          held.radius = radius_feed.next();
          check_table(held.radius, {int64_t(sizeof(Radius) / sizeof(double))}, "an entry of radius_states");
        }
        if (counted(h) || rule.tracks) {
          held.step = step_feed.next();
          TORCH_CHECK(held.step.device().is_cpu() && held.step.scalar_type() == at::kFloat && held.step.numel() == 1,
                      "robustft: the step count of params[", i, "] must be one float32 on the CPU");
        }
        Job job{};
        if (h.master_weights && held.param.element_size() == 2) {
          held.master = master_feed.next();
          TORCH_CHECK(held.master.scalar_type() == at::kFloat, "robustft: masters are float32");
        }
        job.param.seed = seeds.empty() ? 0 : seeds[i];
        job.param.dithered =
            h.stochastic_rounding && held.param.scalar_type() == at::kBFloat16 && !held.master.defined();
        job.param.low_state = held.state[0].defined() && held.state[0].scalar_type() == at::kBFloat16;
        job.rule = &rule;
        job.row = row;
        job.param.rows = rows_of(held.param, rule.rows || rule.survey != Survey::none);
        first_segment_.push_back(segments);
        segments += job.segments();
        jobs_.push_back(job);
      }
    }
    param_feed.check_all_taken(), anchor_feed.check_all_taken(), step_feed.check_all_taken();
    delta_feed.check_all_taken(), radius_feed.check_all_taken(), master_feed.check_all_taken();
    for (const auto& feed : state_feeds) feed.check_all_taken();
    check_table(measures_, {segments, kMeasures}, "measures");
    check_table(alphas_, {segments}, "alphas");
  }

  // The sum of all squares of gradients, in an order of its own that does not depend on the threads.
  Tensor squared_norm(const Tensors& grads) const {
    static const Rule& rule = rule_of("observe");
    Tensors dense;  // alive until the sweep is done
    std::vector<Job> jobs(grads.size());
    std::vector<double> measures(kMeasures * grads.size()), alphas(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
      dense.push_back(grads[i].is_non_overlapping_and_dense() ? grads[i] : grads[i].contiguous());
      Job& job = jobs[i];
      job.param.rows = rows_of(dense[i], false);
      job.param.param = buffer_of(dense[i], dense[i], "grads");
      job.rule = &rule, job.measures = &measures[kMeasures * i], job.alphas = &alphas[i];
    }
    py::gil_scoped_release release;
    robustft::run(jobs, [](const Job& job, const PerRow& alpha, const Piece& piece, Measuring measuring, Measures* found) {
      sweeps().still(job.param, {}, 0, alpha, piece, measuring, found);
    });
    double sum = 0;
    for (size_t i = 0; i < grads.size(); ++i) sum += measures[kMeasures * i + 1];
    return at::scalar_tensor(sum, at::kDouble);
  }

  void run(const Tensors& grads, const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
    if (found_inf && found_inf->item<double>() != 0) return;
    const double scale = grad_scale ? grad_scale->item<double>() : 1;
    const bool none = grads.empty() && !kMoves;
    TORCH_CHECK(none || grads.size() == jobs_.size(), "robustft: ", jobs_.size(), " params but ", grads.size(), " grads");
    Tensors relaid;  // alive until the sweeps are done
    for (size_t i = 0; i < jobs_.size(); ++i) {
      if (i + 4 < jobs_.size()) prefetch(held_[i + 4]);
      bind(i, none ? nullptr : &grads[i], scale, relaid);
    }

    for (size_t i = 0; i < jobs_.size(); ++i) {
      if (kMoves || jobs_[i].rule->pulls()) bump_version(held_[i].param);
      if (kMoves && held_[i].step.defined()) *held_[i].step.template data_ptr<float>() += 1;
    }
    py::gil_scoped_release release;
    robustft::run(jobs_, [this](const Job& job, const PerRow& alpha, const Piece& piece, Measuring measuring,
                                Measures* found) {
      sweep_(job.param, rows()[job.row], job.t, alpha, piece, measuring, found);
    });
  }

 private:
  static constexpr bool kMoves = !std::is_same_v<Hyper, StillHyper>;

  struct Held {
    Tensor param, anchor, state[3], delta, radius, master, step;
  };

  // Thousands of small tensors: their headers are scattered, and waiting for them would cost as much as the step.
  static void prefetch(const Held& held) {
    for (const Tensor* tensor : {&held.param, &held.anchor, &held.state[0], &held.state[1], &held.step}) {
      const char* header = reinterpret_cast<const char*>(tensor->unsafeGetTensorImpl());
      for (int line = 0; line < 3; ++line) __builtin_prefetch(header + 64 * line);
    }
  }

  const Hyper* rows() const { return static_cast<const Hyper*>(hyper_.const_data_ptr()); }

  // Addresses are read anew at every step: whoever swaps a tensor's storage (an offloader, say) finds it used.
  void bind(size_t i, const Tensor* grad, double scale, Tensors& relaid) {
    Job& job = jobs_[i];
    const Held& held = held_[i];
    const Hyper& h = rows()[job.row];
    Param& p = job.param;
    job.terms = {h.strength, h.lr, h.radius};
    job.radius_hyper = {h.k, h.radius_lr, h.radius_beta1, h.radius_beta2};
    job.t = held.step.defined() ? *held.step.template const_data_ptr<float>() + kMoves : 0;
    job.measures = measures_.data_ptr<double>() + kMeasures * first_segment_[i];
    job.alphas = alphas_.data_ptr<double>() + first_segment_[i];
    job.radius = held.radius.defined() ? static_cast<Radius*>(held.radius.data_ptr()) : nullptr;
    job.graded = grad != nullptr;
    p.sign = (h.maximize ? -1 : 1) / scale;
    p.penalty = job.rule->penalty(h.strength);
    p.param = buffer_of(held.param, held.param, "params");
    if (held.master.defined()) p.working = p.param, p.param = buffer_of(held.master, held.param, "masters");
    if (grad && same_layout(*grad, held.param)) {
      p.grad = buffer_of(*grad, held.param, "grads");
    } else if (grad) {
      relaid.push_back(at::empty_like(held.param, grad->options()).copy_(*grad));
      p.grad = buffer_of(relaid.back(), held.param, "grads");
    } else {
      p.grad = {};
    }
    if (held.anchor.defined()) p.anchor = buffer_of(held.anchor, held.param, "anchors");
    if (held.delta.defined()) p.delta = buffer_of(held.delta, held.param, "deltas");
    for (int s = 0; s < 3; ++s)
      if (held.state[s].defined()) p.state[s] = buffer_of(held.state[s], held.param, "the state");
  }

  BaseSweep<Hyper> sweep_;
  Tensor measures_, alphas_, hyper_;
  std::vector<Held> held_;
  std::vector<Job> jobs_;
  std::vector<int64_t> first_segment_;
};

using AdamWStep = PreparedStep<AdamWHyper>;
using SGDStep = PreparedStep<SGDHyper>;
using StillStep = PreparedStep<StillHyper>;
using Sizes = std::vector<int64_t>;
using Names = std::vector<std::string>;

AdamWStep prepare_adamw(Tensors params, const Tensors& anchors, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                        const Tensors& max_exp_avg_sqs, const Tensors& deltas, const Tensors& radius_states,
                        const Tensors& masters, const Tensors& steps, Tensor measures, Tensor alphas, Tensor hyper,
                        const Sizes& group_sizes, const Names& rules, const Sizes& seeds) {
  const auto always = [](const AdamWHyper&) { return true; };
  const auto amsgrad = [](const AdamWHyper& h) { return h.amsgrad != 0; };
  return {sweeps().adamw, {{"exp_avgs", always}, {"exp_avg_sqs", always}, {"max_exp_avg_sqs", amsgrad}}, always,
          std::move(params), anchors, {exp_avgs, exp_avg_sqs, max_exp_avg_sqs, deltas, radius_states, masters}, steps,
          std::move(measures), std::move(alphas), std::move(hyper), group_sizes, rules, seeds};
}

SGDStep prepare_sgd(Tensors params, const Tensors& anchors, const Tensors& momentum_buffers, const Tensors& deltas,
                    const Tensors& radius_states, const Tensors& masters, const Tensors& steps, Tensor measures,
                    Tensor alphas, Tensor hyper, const Sizes& group_sizes, const Names& rules, const Sizes& seeds) {
  const auto momentum = [](const SGDHyper& h) { return h.momentum != 0; };
  const auto counted = [](const SGDHyper& h) { return h.momentum != 0 || h.stochastic_rounding != 0; };
  return {sweeps().sgd, {{"momentum_buffers", momentum}}, counted, std::move(params), anchors,
          {momentum_buffers, deltas, radius_states, masters}, steps, std::move(measures), std::move(alphas), std::move(hyper),
          group_sizes, rules, seeds};
}

StillStep prepare_still(Tensors params, const Tensors& anchors, const Tensors& masters, const Tensors& steps,
                        Tensor measures, Tensor alphas, Tensor hyper, const Sizes& group_sizes, const Names& rules,
                        const Sizes& seeds) {
  const auto counted = [](const StillHyper& h) { return h.stochastic_rounding != 0; };
  return {sweeps().still, {}, counted, std::move(params), anchors, {{}, {}, masters}, steps,
          std::move(measures), std::move(alphas), std::move(hyper), group_sizes, rules, seeds};
}

// Everything that a plan depends on: parameters, gradients but for their addresses, and which objects the state is.
class Fingerprint {
 public:
  void add(const Tensor& param) {
    put(int64_t(param.unsafeGetTensorImpl()));
    put(int64_t(param.const_data_ptr()));
    add_metadata(param);
    const Tensor& grad = param.grad();
    put(grad.defined());
    if (grad.defined()) add_metadata(grad);
  }
  void add(PyObject* kept, bool addresses) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(kept, &at, &key, &value);) {
      put(int64_t(key)), put(int64_t(value));
      if (addresses && THPVariable_Check(value)) put(int64_t(THPVariable_Unpack(value).const_data_ptr()));
    }
  }
  py::bytes bytes() const { return {reinterpret_cast<const char*>(words_.data()), words_.size() * sizeof(int64_t)}; }

 private:
  void put(int64_t word) { words_.push_back(word); }
  void add_metadata(const Tensor& t) {
    put(int64_t(t.scalar_type()) << 32 | int64_t(t.layout()) << 16 | int64_t(t.device().type()));
    put(t.device().index());
    for (int64_t size : t.sizes()) put(size);
    if (t.layout() != at::kStrided) return;
    for (int64_t stride : t.strides()) put(stride);
  }

  std::vector<int64_t> words_;
};

void addresses(const Tensors& tensors, const Tensor& out) {
  TORCH_CHECK(out.device().is_cpu() && out.scalar_type() == at::kLong && out.is_contiguous() &&
                  out.numel() == int64_t(tensors.size()),
              "robustft: addresses go to a contiguous int64 CPU tensor of ", tensors.size());
  int64_t* to = out.data_ptr<int64_t>();
  for (const Tensor& tensor : tensors) *to++ = int64_t(tensor.const_data_ptr());
}

py::bytes fingerprint(const Tensors& params, const std::vector<py::dict>& kept, bool addresses) {
  Fingerprint all;
  for (const Tensor& param : params) all.add(param);
  for (const py::dict& of_param : kept) all.add(of_param.ptr(), addresses);
  return all.bytes();
}

}  // namespace
}  // namespace robustft

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace robustft;
  const py::arg grads("grads");
  const py::arg_v grad_scale = py::arg("grad_scale") = py::none(), found_inf = py::arg("found_inf") = py::none();
  py::class_<AdamWStep>(m, "AdamWStep")
      .def("__call__", &AdamWStep::run, grads, grad_scale, found_inf)
      .def("squared_norm", &AdamWStep::squared_norm, grads);
  py::class_<SGDStep>(m, "SGDStep")
      .def("__call__", &SGDStep::run, grads, grad_scale, found_inf)
      .def("squared_norm", &SGDStep::squared_norm, grads);
  py::class_<StillStep>(m, "StillStep").def("__call__", &StillStep::run, grads, grad_scale, found_inf);
  m.def("prepare_adamw", &prepare_adamw);
  m.def("prepare_sgd", &prepare_sgd);
  m.def("prepare_still", &prepare_still);
  m.def("fingerprint", &fingerprint);
  m.def("addresses", &addresses);
#define ROBUSTFT_NAME(name) #name,
  m.attr("ADAMW_HYPER") = std::vector<std::string>{ROBUSTFT_ADAMW_HYPER(ROBUSTFT_NAME)};
  m.attr("SGD_HYPER") = std::vector<std::string>{ROBUSTFT_SGD_HYPER(ROBUSTFT_NAME)};
  m.attr("STILL_HYPER") = std::vector<std::string>{ROBUSTFT_STILL_HYPER(ROBUSTFT_NAME)};
#undef ROBUSTFT_NAME
  m.attr("CHUNK") = kChunk;
  m.attr("ISA") = sweeps().isa;
}
