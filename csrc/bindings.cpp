// The native backend as Python sees it. A prepared step holds its tensors as jobs. Each call takes their gradients.
#include <torch/extension.h>

#include <algorithm>
#include <deque>
#include <map>
#include <sstream>

#include "cpu/schedule.h"
#include "fingerprint.h"

namespace robustft {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;

// The dtypes in the order of DType, and sets of them with one bit for each.
constexpr at::ScalarType kDtypes[] = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};
using Dtypes = unsigned;
constexpr Dtypes only(DType dtype) { return 1u << int(dtype); }
constexpr Dtypes kAny = 0b1111, kSingle = only(DType::f32) | only(DType::bf16);

// The place of a tensor's dtype in kDtypes, or 4 if it is not there.
int place_in_dtypes(const Tensor& tensor) {
  return int(std::find(std::begin(kDtypes), std::end(kDtypes), tensor.scalar_type()) - std::begin(kDtypes));
}

std::string names_of(Dtypes dtypes) {
  std::ostringstream text;
  for (int k = 0; k < 4; ++k)
    if (dtypes >> k & 1) text << (text.tellp() > 0 ? " or " : "") << kDtypes[k];
  return text.str();
}

// Strides of dimensions of size 1 say nothing about memory.
bool same_layout(const Tensor& a, const Tensor& b) {
  if (!a.sizes().equals(b.sizes())) return false;
  if (a.numel() == 0) return true;
  for (int64_t k = 0; k < a.dim(); ++k)
    if (a.size(k) != 1 && a.stride(k) != b.stride(k)) return false;
  return true;
}

// A dense tensor as rows of dimension 0, or as one row.
Rows rows_of(const Tensor& tensor, bool by_rows) {
  const int64_t n = tensor.numel(), count = by_rows && tensor.dim() > 1 ? tensor.size(0) : 1;
  const int64_t length = count ? n / count : 0;
  return {count, length, n && count > 1 ? tensor.stride(0) : length};
}

// Tensors whose memory, if they have any, is not their numbers.
constexpr c10::DispatchKeySet kUnreadable({c10::DispatchKey::Python, c10::DispatchKey::Negative,
                                           c10::DispatchKey::Conjugate, c10::DispatchKey::ZeroTensor});

std::string described(const Tensor& t) {
  std::ostringstream text;
  text << t.scalar_type() << " of shape " << t.sizes();
  if (t.layout() == at::kStrided) text << " and strides " << t.strides();
  text << " on " << t.device();
  return text.str();
}

// How a message names a tensor: "exp_avg of params[3], parameter 'head.weight',".
std::string place_of(const char* what, size_t i, const std::string& label) {
  const std::string index = "params[" + std::to_string(i) + "]";
  return (what == std::string("param") ? index : what + (" of " + index)) + (label.empty() ? "" : ", " + label + ",");
}

void check_table(const Tensor& table, at::IntArrayRef sizes, const std::string& name) {
  TORCH_CHECK(table.device().is_cpu() && table.scalar_type() == at::kDouble && table.is_contiguous() &&
                  table.sizes().equals(sizes),
              "robustft: ", name, " must be a contiguous float64 CPU tensor of shape ", sizes, ", got ",
              described(table));
}

void bump_version(const Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

Measuring measuring_of(const std::string& name) {
  return name == "squares" ? Measuring::squares : name == "magnitudes" ? Measuring::magnitudes : Measuring::none;
}

// The facts of a rule, as methods.Rule declares them, with its functions.
Rule rule_of(const py::handle& facts) {
  const auto text = [&](const char* key) { return facts.attr(key).cast<std::string>(); };
  const auto flag = [&](const char* key) { return facts.attr(key).cast<bool>(); };
  const std::string name = text("name"), surveys = text("surveys"), penalty = text("penalty");
  Rule rule;
  rule.measuring = measuring_of(text("measures"));
  rule.by_rows = flag("by_rows"), rule.tied = flag("tied"), rule.given = flag("given");
  rule.pulls = flag("pulls"), rule.tracks = flag("tracks");
  rule.survey = surveys == "slope" ? Survey::slope : surveys == "largest_row" ? Survey::largest_row : Survey::none;
  rule.linear = penalty == "linear", rule.sign = penalty == "sign";
  if (!rule.given) rule.alpha = rule.pulls ? row_of(kAlphas, name).function : keep;
  if (!text("learns").empty()) rule.learning = &row_of(kLearnings, name);
  return rule;
}

// All tensors of a step. `Hyper` determines the base.
template <class Hyper>
class PreparedStep {
 public:
  // table: a contract.StepTable.
  PreparedStep(BaseSweep<Hyper> sweep, const py::object& table)
      : sweep_(sweep),
        results_(table.attr("results").cast<Tensor>()),
        alphas_(table.attr("alphas").cast<Tensor>()),
        hyper_(table.attr("hyper").cast<Tensor>()) {
    constexpr int64_t kColumns = sizeof(Hyper) / sizeof(double);
    check_table(hyper_, {hyper_.dim() ? hyper_.size(0) : 0, kColumns}, "hyper");
    for (const py::handle& key : table.attr("base").attr("moments")) moments_.push_back(key.cast<std::string>());
    TORCH_CHECK(moments_.size() <= kStates, "robustft: the native backend has room for ", kStates, " moments");
    std::map<std::string, const Rule*> rules;
    int64_t segments = 0;
    for (const py::handle& of : table.attr("tensors")) {
      const py::object facts = of.attr("spec").attr("rule");
      const Rule*& rule = rules[facts.attr("name").cast<std::string>()];
      if (!rule) rule = &rules_.emplace_back(rule_of(facts));
      Job job{};
      job.rule = rule;
      job.row = of.attr("row").cast<int>();
      TORCH_CHECK(job.row >= 0 && job.row < hyper_.size(0), "robustft: hyper has ", hyper_.size(0),
                  " rows, and params[", jobs_.size(), "] asks for row ", job.row);
      job.param.seed = of.attr("seed").cast<int64_t>();
      job.param.dithered = of.attr("dithered").cast<bool>();
      take(of, *rule, facts);
      const Held& held = held_.back();
      job.param.low_state = held.state[0].defined() && held.state[0].scalar_type() == at::kBFloat16;
      job.param.rows = rows_of(held.param, rule->by_rows || rule->survey != Survey::none);
      first_segment_.push_back(segments);
      segments += job.segments();
      jobs_.push_back(job);
    }
    check_table(results_, {segments, kResults}, "results");
    check_table(alphas_, {segments}, "alphas");
  }

  // The sum of the squares of all gradients. Its additions have an order of their own, which does not depend on the
  // threads.
  Tensor squared_norm(const Tensors& grads) const {
    static const Rule rule = [] {
      Rule observe;
      observe.measuring = Measuring::squares, observe.alpha = keep;
      return observe;
    }();
    Tensors dense;  // alive until the sweep is done
    std::vector<Job> jobs(grads.size());
    std::vector<double> results(kResults * grads.size()), alphas(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
      dense.push_back(grads[i].is_non_overlapping_and_dense() ? grads[i] : grads[i].contiguous());
      Job& job = jobs[i];
      job.param.rows = rows_of(dense[i], false);
      TORCH_CHECK(place_in_dtypes(dense[i]) < 4, "robustft: grads[", i, "] must be ", names_of(kAny), ", got ",
                  described(dense[i]));
      job.param.param = {dense[i].data_ptr(), DType(place_in_dtypes(dense[i]))};
      job.rule = &rule, job.results = &results[kResults * i], job.alphas = &alphas[i];
    }
    py::gil_scoped_release release;
    robustft::run(jobs, [](const Job& job, const PerRow& alpha, const Piece& piece, Measuring measuring, Measures* found) {
      sweeps().no_step(job.param, {}, 0, alpha, piece, measuring, found);
    });
    double sum = 0;
    for (const Job& job : jobs) sum += recorded(job, 0).before;
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
      if (kMoves || jobs_[i].rule->pulls) bump_version(held_[i].param);
      if (kMoves && held_[i].step.defined()) *held_[i].step.template data_ptr<float>() += 1;
    }
    py::gil_scoped_release release;
    robustft::run(jobs_, [this](const Job& job, const PerRow& alpha, const Piece& piece, Measuring measuring,
                                Measures* found) {
      sweep_(job.param, rows()[job.row], job.t, alpha, piece, measuring, found);
    });
  }

 private:
  static constexpr bool kMoves = !std::is_same_v<Hyper, NoStepHyper>;

  static constexpr int kStates = 3;

  struct Held {
    Tensor param, anchor, state[kStates], delta, learned, master, step;
    std::string label;
  };

  // Takes the tensors of the next parameter, and checks what does not change between steps.
  void take(const py::handle& of, const Rule& rule, const py::object& facts) {
    const size_t i = held_.size();
    Held& held = held_.emplace_back();
    held.label = of.attr("label").cast<std::string>();
    held.param = of.attr("param").cast<Tensor>();
    const py::dict state = of.attr("state").cast<py::dict>();
    const auto kept = [&](const std::string& key) {
      return state.contains(key) ? state[key.c_str()].cast<Tensor>() : Tensor();
    };
    const auto needed = [&](const std::string& key) {
      TORCH_CHECK(state.contains(key), "robustft: ", place_of("param", i, held.label), " has no ", key,
                  " in its state, which its rule needs");
      return kept(key);
    };
    TORCH_CHECK(held.param.is_non_overlapping_and_dense(), "robustft: ", place_of("param", i, held.label),
                " must fill its memory without gaps, got ", described(held.param));
    if (const py::object anchor = of.attr("anchor"); !anchor.is_none()) held.anchor = anchor.cast<Tensor>();
    for (size_t s = 0; s < moments_.size(); ++s) held.state[s] = kept(moments_[s]);
    for (size_t s = 0; s + 1 < moments_.size(); ++s) needed(moments_[s]);  // the last may be absent
    if (rule.tracks) held.delta = needed("delta");
    if (rule.learning) {
      const auto key = facts.attr("learns").cast<std::string>();
      held.learned = needed(key);
      check_table(held.learned, {rule.learning->numbers}, place_of(key.c_str(), i, held.label));
    }
    held.master = kept("master");
    if (const py::object step = of.attr("step"); !step.is_none()) held.step = step.cast<Tensor>();
    TORCH_CHECK(!held.step.defined() || (held.step.device().is_cpu() && held.step.scalar_type() == at::kFloat &&
                                         held.step.numel() == 1),
                "robustft: ", place_of("step", i, held.label), " must be one Float on the CPU, got ",
                held.step.defined() ? described(held.step) : "");
  }

  // The memory of a tensor. It must have one of these dtypes, and lie in memory as its param does.
  Buffer buffer_of(const Tensor& tensor, size_t i, const char* what, Dtypes dtypes) const {
    const Held& held = held_[i];
    const int dtype = place_in_dtypes(tensor);
    TORCH_CHECK(tensor.has_storage() && !tensor.key_set().has_any(kUnreadable), "robustft: ",
                place_of(what, i, held.label), " has no memory of its own that can be read as it is");
    TORCH_CHECK((dtypes >> dtype & 1) && tensor.device().is_cpu() && tensor.layout() == at::kStrided &&
                    same_layout(tensor, held.param),
                "robustft: ", place_of(what, i, held.label), " must be ", names_of(dtypes), " of shape ",
                held.param.sizes(), " and lie in memory as the param does, with strides ", held.param.strides(),
                " on cpu; got ", described(tensor));
    return {tensor.data_ptr(), DType(dtype)};
  }

  // For thousands of small tensors. Their headers are scattered, and waiting for them would cost as much as the step.
  static void prefetch(const Held& held) {
    for (const Tensor* tensor : {&held.param, &held.anchor, &held.state[0], &held.state[1], &held.step}) {
      const char* header = reinterpret_cast<const char*>(tensor->unsafeGetTensorImpl());
      for (int line = 0; line < 3; ++line) __builtin_prefetch(header + 64 * line);
    }
  }

  const Hyper* rows() const { return static_cast<const Hyper*>(hyper_.const_data_ptr()); }

  // Addresses are read anew at each step. If somebody swaps a tensor's storage (an offloader, say), the new one counts.
  void bind(size_t i, const Tensor* grad, double scale, Tensors& relaid) {
    Job& job = jobs_[i];
    const Held& held = held_[i];
    const Hyper& h = rows()[job.row];
    Param& p = job.param;
    job.terms = terms_of(h);
    job.t = held.step.defined() ? *held.step.template const_data_ptr<float>() + kMoves : 0;
    job.results = results_.data_ptr<double>() + kResults * first_segment_[i];
    job.alphas = alphas_.data_ptr<double>() + first_segment_[i];
    job.learned = held.learned.defined() ? held.learned.template data_ptr<double>() : nullptr;
    job.graded = grad != nullptr;
    p.sign = (h.maximize ? -1 : 1) / scale;
    p.penalty = job.rule->penalty(h.strength);
    p.param = buffer_of(held.param, i, "param", kAny);
    const bool is_double = p.param.dtype == DType::f64;
    if (held.master.defined()) p.working = p.param, p.param = buffer_of(held.master, i, "master", only(DType::f32));
    p.grad = {};
    if (grad && grad->sizes().equals(held.param.sizes()) && !same_layout(*grad, held.param)) {
      relaid.push_back(at::empty_like(held.param, grad->options()).copy_(*grad));
      grad = &relaid.back();
    }
    if (grad) p.grad = buffer_of(*grad, i, "grad", kAny);
    if (held.anchor.defined()) p.anchor = buffer_of(held.anchor, i, "anchor", kAny);
    if (held.delta.defined()) p.delta = buffer_of(held.delta, i, "delta", only(is_double ? DType::f64 : DType::bf16));
    for (int s = 0; s < kStates; ++s)
      if (held.state[s].defined())
        p.state[s] = buffer_of(held.state[s], i, moments_[s].c_str(), is_double ? only(DType::f64) : kSingle);
  }

  BaseSweep<Hyper> sweep_;
  Tensor results_, alphas_, hyper_;
  std::vector<std::string> moments_;  // their names
  std::deque<Rule> rules_;  // jobs point to them
  std::vector<Held> held_;
  std::vector<Job> jobs_;
  std::vector<int64_t> first_segment_;
};

using AdamWStep = PreparedStep<AdamWHyper>;
using SGDStep = PreparedStep<SGDHyper>;
using NoStepStep = PreparedStep<NoStepHyper>;

int64_t addresses(const Tensors& tensors, const Tensor& out) {
  TORCH_CHECK(out.device().is_cpu() && out.scalar_type() == at::kLong && out.is_contiguous() &&
                  out.numel() == int64_t(tensors.size()),
              "robustft: addresses go to a contiguous int64 CPU tensor of ", tensors.size());
  int64_t *to = out.data_ptr<int64_t>(), all = 0;
  for (const Tensor& tensor : tensors) all |= *to++ = int64_t(tensor.const_data_ptr());
  return all;
}

// The two sums as an int64 tensor. `flat` is a part of a tensor without gaps, and the rest are the indices of its
// elements in the whole.
Tensor digest_of(const Tensor& flat, std::vector<int64_t> sizes, std::vector<int64_t> steps, int64_t first) {
  TORCH_CHECK(flat.device().is_cpu() && flat.is_contiguous() && !flat.key_set().has_any(kUnreadable) &&
                  c10::multiply_integers(sizes) == flat.numel() && sizes.size() == steps.size() && !sizes.empty() &&
                  flat.element_size() <= 8,
              "robustft: a digest is taken of a contiguous CPU tensor of the given sizes, got ", described(flat));
  const Tensor out = at::empty({kDigests}, at::kLong);
  py::gil_scoped_release release;
  const Sums sums = digest(flat.const_data_ptr(), int(flat.element_size()), {std::move(sizes), std::move(steps), first});
  std::copy(sums.begin(), sums.end(), out.data_ptr<int64_t>());
  return out;
}

py::object fingerprint(const Tensors& params, const std::vector<py::dict>& kept, bool addresses,
                       const std::optional<py::bytes>& last) {
  Fingerprint all(last ? py::object(*last) : py::none());
  for (const Tensor& param : params) all.add(param);
  for (const py::dict& of_param : kept) all.add(of_param.ptr(), addresses);
  return all.bytes();
}

py::object forms(const Tensors& tensors, bool addresses) {
  Fingerprint all;
  for (const Tensor& tensor : tensors) all.add_form(tensor, addresses);
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
  py::class_<NoStepStep>(m, "NoStepStep").def("__call__", &NoStepStep::run, grads, grad_scale, found_inf);
  m.def("prepare_adamw", [](const py::object& table) { return AdamWStep(sweeps().adamw, table); });
  m.def("prepare_sgd", [](const py::object& table) { return SGDStep(sweeps().sgd, table); });
  m.def("prepare_no_step", [](const py::object& table) { return NoStepStep(sweeps().no_step, table); });
  m.def("fingerprint", &fingerprint);
  m.def("forms", &forms);
  m.def("digest", &digest_of);
  m.def("addresses", &addresses);
#define ROBUSTFT_NAME(name) #name,
  m.attr("ADAMW_HYPER") = std::vector<std::string>{ROBUSTFT_ADAMW_HYPER(ROBUSTFT_NAME)};
  m.attr("SGD_HYPER") = std::vector<std::string>{ROBUSTFT_SGD_HYPER(ROBUSTFT_NAME)};
  m.attr("NO_STEP_HYPER") = std::vector<std::string>{ROBUSTFT_NO_STEP_HYPER(ROBUSTFT_NAME)};
  m.attr("MEASURES") = std::vector<std::string>{ROBUSTFT_MEASURES(ROBUSTFT_NAME)};
#undef ROBUSTFT_NAME
  m.attr("CHUNK") = kChunk;
  m.attr("ISA") = sweeps().isa;
}
