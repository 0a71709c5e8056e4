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

Buffer buffer_of(const Tensor& tensor, const Tensor& param, const char* name) {
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
  using Sweep = void (*)(const Segment&, const Hyper&, double, double, int64_t, int64_t, Measures*);

  // What each state list is called, and whether the parameters of a group with this row have an entry in it.
  struct StateList {
    const char* name;
    const Tensors& tensors;
    bool (*drawn)(const Hyper&);
  };

  PreparedStep(Sweep sweep, Tensors params, const Tensors& anchors, const std::vector<StateList>& states,
               const Tensors& steps, bool (*counted)(const Hyper&), Tensor measures, Tensor alphas, Tensor hyper,
               const std::vector<int64_t>& group_sizes, const std::vector<std::string>& rules,
               const std::vector<int64_t>& seeds)
      : sweep_(sweep), measures_(std::move(measures)), alphas_(std::move(alphas)), hyper_(std::move(hyper)) {
    const int64_t n = params.size(), groups = group_sizes.size();
    check_table(measures_, {n, 3}, "measures");
    check_table(alphas_, {n}, "alphas");
    check_table(hyper_, {groups, int64_t(sizeof(Hyper) / sizeof(double))}, "hyper");
    TORCH_CHECK(int64_t(rules.size()) == groups, "robustft: ", groups, " groups but ", rules.size(), " rules");

    Feed<Tensor> param_feed(params, "params"), anchor_feed(anchors, "anchors"), step_feed(steps, "steps");
    std::vector<Feed<Tensor>> state_feeds;
    Feed<int64_t> seed_feed(seeds, "seeds");
    for (const StateList& state : states) state_feeds.emplace_back(state.tensors, state.name);
    for (int row = 0; row < groups; ++row) {
      const Rule rule = rule_of(rules[row]);
      const Hyper& h = rows()[row];
      for (int64_t k = 0; k < group_sizes[row]; ++k) {
        const int64_t i = jobs_.size();
        Held& held = held_.emplace_back();
        held.param = param_feed.next();
        TORCH_CHECK(held.param.is_non_overlapping_and_dense(), "robustft: params[", i, "] is not dense");
        if (h.anchored) held.anchor = anchor_feed.next();
        for (size_t s = 0; s < states.size(); ++s)
          if (states[s].drawn(h)) held.state[s] = state_feeds[s].next();
        if (counted(h)) {
          held.step = step_feed.next();
          TORCH_CHECK(held.step.device().is_cpu() && held.step.scalar_type() == at::kFloat && held.step.numel() == 1,
                      "robustft: the step count of params[", i, "] must be one float32 on the CPU");
        }
        Job job{};
        if (h.stochastic_rounding) {
          const int64_t seed = seed_feed.next();
          if (held.param.scalar_type() == at::kBFloat16) job.segment.seed = seed;
        }
        job.rule = rule;
        job.row = row;
        job.measures = measures_.data_ptr<double>() + 3 * i;
        job.alpha = alphas_.data_ptr<double>() + i;
        jobs_.push_back(job);
      }
    }
    param_feed.check_all_taken(), anchor_feed.check_all_taken(), step_feed.check_all_taken();
    seed_feed.check_all_taken();
    for (const auto& feed : state_feeds) feed.check_all_taken();
  }

  void run(const Tensors& grads, const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
    if (found_inf && found_inf->item<double>() != 0) return;
    const double scale = grad_scale ? grad_scale->item<double>() : 1;
    TORCH_CHECK(grads.size() == jobs_.size(), "robustft: ", jobs_.size(), " params but ", grads.size(), " grads");
    Tensors relaid;  // alive until the sweeps are done
    for (size_t i = 0; i < jobs_.size(); ++i) {
      if (i + 4 < jobs_.size()) prefetch(held_[i + 4]);
      bind(jobs_[i], held_[i], grads[i], relaid);
      jobs_[i].segment.grad_scale = scale;
    }

    for (Held& held : held_) {
      bump_version(held.param);
      if (held.step.defined()) *held.step.template data_ptr<float>() += 1;
    }
    py::gil_scoped_release release;
    robustft::run(jobs_, [this](const Job& job, double alpha, int64_t begin, int64_t end, Measures* partial) {
      sweep_(job.segment, rows()[job.row], job.t, alpha, begin, end, partial);
    });
  }

 private:
  struct Held {
    Tensor param, anchor, state[3], step;
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
  void bind(Job& job, const Held& held, const Tensor& grad, Tensors& relaid) {
    const Hyper& h = rows()[job.row];
    job.strength = h.strength;
    job.lr = h.lr;
    job.t = held.step.defined() ? *held.step.template const_data_ptr<float>() + 1 : 0;
    job.segment.numel = held.param.numel();
    job.segment.param = buffer_of(held.param, held.param, "params");
    if (same_layout(grad, held.param)) {
      job.segment.grad = buffer_of(grad, held.param, "grads");
    } else {
      relaid.push_back(at::empty_like(held.param, grad.options()).copy_(grad));
      job.segment.grad = buffer_of(relaid.back(), held.param, "grads");
    }
    if (held.anchor.defined()) job.segment.anchor = buffer_of(held.anchor, held.param, "anchors");
    for (int s = 0; s < 3; ++s)
      if (held.state[s].defined()) job.segment.state[s] = buffer_of(held.state[s], held.param, "the state");
  }

  Sweep sweep_;
  Tensor measures_, alphas_, hyper_;
  std::vector<Held> held_;
  std::vector<Job> jobs_;
};

using AdamWStep = PreparedStep<AdamWHyper>;
using SGDStep = PreparedStep<SGDHyper>;

AdamWStep prepare_adamw(Tensors params, const Tensors& anchors, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                        const Tensors& max_exp_avg_sqs, const Tensors& steps, Tensor measures, Tensor alphas,
                        Tensor hyper, const std::vector<int64_t>& group_sizes, const std::vector<std::string>& rules,
                        const std::vector<int64_t>& seeds) {
  const auto always = [](const AdamWHyper&) { return true; };
  const auto amsgrad = [](const AdamWHyper& h) { return h.amsgrad != 0; };
  return {sweeps().adamw, std::move(params), anchors,
          {{"exp_avgs", exp_avgs, always},
           {"exp_avg_sqs", exp_avg_sqs, always},
           {"max_exp_avg_sqs", max_exp_avg_sqs, amsgrad}},
          steps, always, std::move(measures), std::move(alphas), std::move(hyper), group_sizes, rules, seeds};
}

SGDStep prepare_sgd(Tensors params, const Tensors& anchors, const Tensors& momentum_buffers, const Tensors& steps,
                    Tensor measures, Tensor alphas, Tensor hyper, const std::vector<int64_t>& group_sizes,
                    const std::vector<std::string>& rules, const std::vector<int64_t>& seeds) {
  const auto momentum = [](const SGDHyper& h) { return h.momentum != 0; };
  const auto counted = [](const SGDHyper& h) { return h.momentum != 0 || h.stochastic_rounding != 0; };
  return {sweeps().sgd, std::move(params), anchors, {{"momentum_buffers", momentum_buffers, momentum}},
          steps, counted, std::move(measures), std::move(alphas), std::move(hyper), group_sizes, rules, seeds};
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
  py::class_<AdamWStep>(m, "AdamWStep").def("__call__", &AdamWStep::run, grads, grad_scale, found_inf);
  py::class_<SGDStep>(m, "SGDStep").def("__call__", &SGDStep::run, grads, grad_scale, found_inf);
  m.def("prepare_adamw", &prepare_adamw);
  m.def("prepare_sgd", &prepare_sgd);
  m.def("fingerprint", &fingerprint);
  m.def("addresses", &addresses);
#define ROBUSTFT_NAME(name) #name,
  m.attr("ADAMW_HYPER") = std::vector<std::string>{ROBUSTFT_ADAMW_HYPER(ROBUSTFT_NAME)};
  m.attr("SGD_HYPER") = std::vector<std::string>{ROBUSTFT_SGD_HYPER(ROBUSTFT_NAME)};
#undef ROBUSTFT_NAME
  m.attr("CHUNK") = kChunk;
  m.attr("ISA") = sweeps().isa;
}
