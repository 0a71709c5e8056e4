// Table: a StepTable of Python in C++. It checks all tensors, keeps them alive, and gives their memory.
#pragma once

#include <torch/extension.h>

#include <algorithm>
#include <deque>
#include <map>
#include <sstream>

#include "decide.h"
#include "eight_bit.h"

namespace robustft {

using at::Tensor;
using Tensors = std::vector<Tensor>;

// The dtypes in the order of DType, and sets of them with one bit for each.
constexpr at::ScalarType kDtypes[] = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf, at::kChar, at::kByte};
constexpr int kDtypeCount = std::size(kDtypes), kFloats = 4;
using Dtypes = unsigned;
constexpr Dtypes only(DType dtype) { return 1u << int(dtype); }
constexpr Dtypes kAny = 0b1111, kSingle = only(DType::f32) | only(DType::bf16);

// The place of a tensor's dtype in kDtypes, or kDtypeCount if it is not there.
inline int place_in_dtypes(const Tensor& tensor) {
  return int(std::find(std::begin(kDtypes), std::end(kDtypes), tensor.scalar_type()) - std::begin(kDtypes));
}

inline std::string names_of(Dtypes dtypes) {
  std::ostringstream text;
  for (int k = 0; k < kDtypeCount; ++k)
    if (dtypes >> k & 1) text << (text.tellp() > 0 ? " or " : "") << kDtypes[k];
  return text.str();
}

// Strides of dimensions of size 1 say nothing about memory.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  if (!a.sizes().equals(b.sizes())) return false;
  if (a.numel() == 0) return true;
  for (int64_t k = 0; k < a.dim(); ++k)
    if (a.size(k) != 1 && a.stride(k) != b.stride(k)) return false;
  return true;
}

// A dense tensor as rows of dimension 0, or as one row.
inline Rows rows_of(const Tensor& tensor, bool by_rows) {
  const int64_t n = tensor.numel(), count = by_rows && tensor.dim() > 1 ? tensor.size(0) : 1;
  const int64_t length = count ? n / count : 0;
  return {count, length, n && count > 1 ? tensor.stride(0) : length};
}

// Tensors whose memory, if they have any, is not their numbers.
constexpr c10::DispatchKeySet kUnreadable({c10::DispatchKey::Python, c10::DispatchKey::Negative,
                                           c10::DispatchKey::Conjugate, c10::DispatchKey::ZeroTensor});

inline std::string described(const Tensor& t) {
  std::ostringstream text;
  text << t.scalar_type() << " of shape " << t.sizes();
  if (t.layout() == at::kStrided) text << " and strides " << t.strides();
  text << " on " << t.device();
  return text.str();
}

// How a message names a tensor: "exp_avg of params[3], parameter 'head.weight',".
inline std::string place_of(const char* what, size_t i, const std::string& label) {
  const std::string index = "params[" + std::to_string(i) + "]";
  return (what == std::string("param") ? index : what + (" of " + index)) + (label.empty() ? "" : ", " + label + ",");
}

inline void check_numbers(const Tensor& numbers, at::IntArrayRef sizes, at::Device device, const std::string& name) {
  TORCH_CHECK(numbers.device() == device && numbers.scalar_type() == at::kDouble && numbers.is_contiguous() &&
                  numbers.sizes().equals(sizes),
              "robustft: ", name, " must be a contiguous float64 tensor of shape ", sizes, " on ", device, ", got ",
              described(numbers));
}

// Tells the processor that a tensor's header will be read, or that of its memory.
inline void expect(const Tensor& tensor) {
  const char* header = reinterpret_cast<const char*>(tensor.unsafeGetTensorImpl());
  for (int line = 0; line < 3; ++line) __builtin_prefetch(header + 64 * line);
}
inline void expect_storage(const Tensor& tensor) {
  if (tensor.defined()) __builtin_prefetch(tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
}

inline void bump_version(const Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

// A rule's entry in an enum, by its name.
#define ROBUSTFT_FIND(entry, ...) \
  if (name == #entry) return Found::entry;
inline Alpha alpha_named(const std::string& name) {
  using Found = Alpha;
  ROBUSTFT_ALPHAS(ROBUSTFT_FIND)
  TORCH_CHECK_VALUE(false, "robustft: the C++ backends have no function for the rule '", name, "'");
}
inline Learning learning_named(const std::string& name) {
  using Found = Learning;
  ROBUSTFT_LEARNINGS(ROBUSTFT_FIND)
  TORCH_CHECK_VALUE(false, "robustft: in the C++ backends, the rule '", name, "' has no function to learn by");
}
#undef ROBUSTFT_FIND
inline int64_t learned_by(Learning which) {
#define ROBUSTFT_CASE(entry, function, count) \
  if (which == Learning::entry) return count;
  ROBUSTFT_LEARNINGS(ROBUSTFT_CASE)
#undef ROBUSTFT_CASE
  return 0;
}

// The facts of a rule, as methods.Rule declares them, with its functions.
inline Rule rule_of(const py::handle& facts) {
  const auto text = [&](const char* key) { return facts.attr(key).cast<std::string>(); };
  const auto flag = [&](const char* key) { return facts.attr(key).cast<bool>(); };
  const std::string measures = text("measures"), surveys = text("surveys"), penalty = text("penalty");
  Rule rule;
  rule.measuring = measures == "squares"      ? Measuring::squares
                   : measures == "magnitudes" ? Measuring::magnitudes
                                              : Measuring::none;
  rule.by_rows = flag("by_rows"), rule.tied = flag("tied"), rule.given = flag("given");
  rule.pulls = flag("pulls"), rule.tracks = flag("tracks"), rule.cautious = flag("cautious");
  rule.survey = surveys == "slope"         ? Survey::slope
                : surveys == "largest_row" ? Survey::largest_row
                : surveys == "conflict"    ? Survey::conflict
                                           : Survey::none;
  rule.linear = penalty == "linear", rule.sign = penalty == "sign";
  if (rule.pulls && !rule.given) rule.alpha = alpha_named(text("name"));
  if (!text("learns").empty()) rule.learning = learning_named(text("name"));
  return rule;
}

constexpr int kStates = 3;

// A parameter of a step, with all that belongs to it.
struct Held {
  Tensor param, anchor, state[kStates], scales[kStates], delta, learned, master, step;
  std::string label;
  const Rule* rule;
  int row;        // of the hyper-parameters
  int64_t first;  // of its segments
  int64_t seed;   // of the stochastic rounding
  bool dithered;  // whether its weights are rounded stochastically
};

// The gradients of a step: those given, or else each parameter's own. The caller holds the GIL.
class Gradients {
 public:
  Gradients(const std::optional<py::list>& given, const std::vector<Held>& held) : held_(held) {
    if (given) given_ = *given;
  }
  size_t size() const { return given_ ? given_->size() : held_.size(); }
  bool empty() const { return size() == 0; }
  const Tensor& operator[](size_t i) const {
    if (given_) {
      PyObject* const grad = PyList_GET_ITEM(given_->ptr(), i);
      TORCH_CHECK_TYPE(THPVariable_Check(grad), "robustft: grads[", i, "] is no tensor");
      return THPVariable_Unpack(grad);
    }
    const Tensor& grad = held_[i].param.grad();
    TORCH_CHECK(grad.defined(), "robustft: ", place_of("param", i, held_[i].label), " has lost its gradient");
    return grad;
  }

 private:
  std::optional<py::list> given_;
  const std::vector<Held>& held_;
};

class Table {
 public:
  // columns: those of hyper. of: a contract.StepTable.
  Table(const py::object& of, at::Device device, int64_t columns)
      : results(of.attr("results").cast<Tensor>()),
        alphas(of.attr("alphas").cast<Tensor>()),
        hyper(of.attr("hyper").cast<Tensor>()),
        device_(device) {
    check_numbers(hyper, {hyper.dim() ? hyper.size(0) : 0, columns}, at::kCPU, "hyper");
    for (const py::handle& key : of.attr("base").attr("moments")) moments_.push_back(key.cast<std::string>());
    TORCH_CHECK(moments_.size() <= kStates, "robustft: the C++ backends have room for ", kStates, " moments");
    std::map<std::string, const Rule*> rules;
    for (const py::handle& tensors : of.attr("tensors")) {
      const py::object facts = tensors.attr("spec").attr("rule");
      const Rule*& rule = rules[facts.attr("name").cast<std::string>()];
      if (!rule) rule = &rules_.emplace_back(rule_of(facts));
      take(tensors, rule, facts);
    }
    check_numbers(results, {segments_, kResults}, device, "results");
    check_numbers(alphas, {segments_}, device, "alphas");
  }

  Table(const Table&) = delete;  // parameters point to its rules

  size_t size() const { return held_.size(); }
  const Held& operator[](size_t i) const { return held_[i]; }
  Gradients gradients(const std::optional<py::list>& given) const { return {given, held_}; }
  // All but the gradients of a parameter, as its memory is now. If somebody swaps a tensor's storage (an offloader,
  // say), the new one counts.
  void bind(size_t i, Param& p) const {
    const Held& held = held_[i];
    p.param = buffer_of(held.param, i, "param", kAny);
    const bool is_double = p.param.dtype == DType::f64;
    if (held.master.defined()) p.working = p.param, p.param = buffer_of(held.master, i, "master", only(DType::f32));
    if (held.anchor.defined()) p.anchor = buffer_of(held.anchor, i, "anchor", kAny);
    if (held.delta.defined()) p.delta = buffer_of(held.delta, i, "delta", only(is_double ? DType::f64 : DType::bf16));
    for (int s = 0; s < kStates; ++s)
      if (held.state[s].defined()) p.state[s] = moment_of(held, i, s, is_double ? only(DType::f64) : kSingle);
  }
  // The memory of a gradient. If it has the shape of its parameter and lies otherwise, it is copied to `relaid` first.
  Buffer grad(size_t i, const Tensor& grad, Tensor& relaid) const {
    const Tensor& param = held_[i].param;
    if (same_layout(grad, param) || !grad.sizes().equals(param.sizes())) return buffer_of(grad, i, "grad", kAny);
    if (!relaid.defined()) relaid = at::empty_like(param, grad.options());
    return buffer_of(relaid.copy_(grad), i, "grad", kAny);
  }
  // What of a parameter does not change.
  Param param_of(size_t i) const {
    const Held& held = held_[i];
    Param p;
    p.rows = rows_of(held.param, held.rule->crosses_rows());
    p.low_state = held.state[0].defined() && held.state[0].scalar_type() == at::kBFloat16;
    p.coded_state = held.scales[0].defined();
    p.seed = held.seed, p.dithered = held.dithered, p.cautious = held.rule->cautious;
    return p;
  }
  void check_count(size_t grads) const {
    TORCH_CHECK(grads == size(), "robustft: ", size(), " params but ", grads, " grads");
  }

  const Tensor results, alphas, hyper;

 private:
  // Takes the tensors of the next parameter, and checks what does not change between steps.
  void take(const py::handle& of, const Rule* rule, const py::object& facts) {
    const size_t i = held_.size();
    Held& held = held_.emplace_back();
    held.rule = rule;
    held.row = of.attr("row").cast<int>();
    TORCH_CHECK(held.row >= 0 && held.row < hyper.size(0), "robustft: hyper has ", hyper.size(0), " rows, and params[",
                i, "] asks for row ", held.row);
    held.label = of.attr("label").cast<std::string>();
    held.param = of.attr("param").cast<Tensor>();
    held.seed = of.attr("seed").cast<int64_t>();
    held.dithered = of.attr("dithered").cast<bool>();
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
    for (size_t s = 0; s < moments_.size(); ++s) {
      held.state[s] = kept(moments_[s]), held.scales[s] = kept(moments_[s] + "_scale");
      TORCH_CHECK(!held.scales[s].defined() || in_blocks(held.param), "robustft: ", place_of("param", i, held.label),
                  " must have rows of a multiple of ", kScaled, " elements, side by side in memory, for moments in 8 "
                  "bits; got ", described(held.param));
    }
    for (size_t s = 0; s + 1 < moments_.size(); ++s) needed(moments_[s]);  // the last may be absent
    if (rule->tracks) held.delta = needed("delta");
    if (rule->learning != Learning::none) {
      const auto key = facts.attr("learns").cast<std::string>();
      held.learned = needed(key);
      check_numbers(held.learned, {learned_by(rule->learning)}, device_, place_of(key.c_str(), i, held.label));
    }
    held.master = kept("master");
    if (const py::object step = of.attr("step"); !step.is_none()) held.step = step.cast<Tensor>();
    TORCH_CHECK(!held.step.defined() || (held.step.device() == device_ && held.step.scalar_type() == at::kFloat &&
                                         held.step.numel() == 1),
                "robustft: ", place_of("step", i, held.label), " must be one Float on ", device_, ", got ",
                held.step.defined() ? described(held.step) : "");
    held.first = segments_;
    segments_ += rule->by_rows ? rows_of(held.param, true).count : 1;
  }

  // The memory of a tensor. It must have one of these dtypes, and lie in memory as its param does.
  Buffer buffer_of(const Tensor& tensor, size_t i, const char* what, Dtypes dtypes) const {
    const Held& held = held_[i];
    const int dtype = place_in_dtypes(tensor);
    TORCH_CHECK(tensor.has_storage() && !tensor.key_set().has_any(kUnreadable), "robustft: ",
                place_of(what, i, held.label), " has no memory of its own that can be read as it is");
    TORCH_CHECK((dtypes >> dtype & 1) && tensor.device() == device_ && tensor.layout() == at::kStrided &&
                    same_layout(tensor, held.param),
                "robustft: ", place_of(what, i, held.label), " must be ", names_of(dtypes), " of shape ",
                held.param.sizes(), " and lie in memory as the param does, with strides ", held.param.strides(), " on ",
                device_, "; got ", described(tensor));
    return {const_cast<void*>(tensor.const_data_ptr()), DType(dtype)};
  }

  // The memory of a moment. Codes are signed in the first, and unsigned in the others.
  Buffer moment_of(const Held& held, size_t i, int s, Dtypes dtypes) const {
    const std::string& name = moments_[s];
    const Tensor& scales = held.scales[s];
    if (!scales.defined()) return buffer_of(held.state[s], i, name.c_str(), dtypes);
    Buffer codes = buffer_of(held.state[s], i, name.c_str(), only(s == 0 ? DType::i8 : DType::u8));
    TORCH_CHECK(scales.device() == device_ && scales.scalar_type() == at::kByte && scales.is_contiguous() &&
                    scales.numel() == held.param.numel() / kScaled,
                "robustft: ", place_of((name + "_scale").c_str(), i, held.label), " must be a contiguous Byte tensor of ",
                held.param.numel() / kScaled, " elements on ", device_, "; got ", described(scales));
    codes.scales = scales.data_ptr<uint8_t>();
    return codes;
  }
  // Whether its rows are blocks that share a scale, side by side.
  static bool in_blocks(const Tensor& param) {
    const Rows rows = rows_of(param, true);
    return param.dim() > 1 && rows.length % kScaled == 0 && rows.contiguous();
  }

  const at::Device device_;
  std::vector<std::string> moments_;  // their names
  std::deque<Rule> rules_;            // parameters point to them
  std::vector<Held> held_;
  int64_t segments_ = 0;
};

}  // namespace robustft
