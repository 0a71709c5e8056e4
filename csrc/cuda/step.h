// Step: the CUDA backend's prepared step. It holds its tensors as a table on the device. Each call sends the addresses
// of their gradients, if these have moved, and launches the kernels.
#pragma once

#include "../fingerprint.h"
#include "../table.h"
#include "layout.h"
#include "upload.h"

namespace robustft::cuda {

// Space on the device, handed out piece by piece. Each piece begins at a multiple of 16 bytes.
class Space {
 public:
  template <class Of>
  size_t take(size_t count) {
    const size_t at = bytes_;
    bytes_ += (count * sizeof(Of) + 15) / 16 * 16;
    return at;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

// A kernel, what it is told, and on how many programs it runs.
struct Launch {
  void* function;
  unsigned programs, threads;
  Args args;
};

// Tensors on the device: their entries, which programs are whose, and scratch memory. `Launch`es refer to it.
class DeviceTable {
 public:
  // entries: with their `programs`. hyper: how many hyper-parameters. live: as in Args, or empty. owners: of the programs
  // of all launches.
  DeviceTable(const Driver& driver, at::Device device, const std::vector<Entry>& entries,
              const std::vector<int32_t>& owners, const std::vector<int64_t>& live, size_t hyper, size_t found,
              void* stream) {
    Space fixed, row, all;
    const size_t n = entries.size();
    const size_t at_entries = fixed.take<Entry>(n), at_owners = fixed.take<int32_t>(owners.size());
    const size_t at_live = fixed.take<int64_t>(live.size());
    const size_t at_grads = row.take<void*>(n), at_hyper = row.take<double>(hyper);
    const size_t at_fixed = all.take<char>(fixed.bytes()), at_row = all.take<char>(row.bytes());
    const size_t at_found = all.take<Measures>(found), at_counters = all.take<int32_t>(n + 1);
    const size_t at_largest = all.take<int64_t>(n), at_factors = all.take<double>(n);
    const size_t at_squared = all.take<double>(n + 1);
    memory_ = at::zeros({int64_t(all.bytes())}, at::TensorOptions(at::kByte).device(device));
    char* const base = static_cast<char*>(memory_.data_ptr());
    args.entries = reinterpret_cast<const Entry*>(base + at_fixed + at_entries);
    args.owners = reinterpret_cast<const int32_t*>(base + at_fixed + at_owners);
    args.grads = reinterpret_cast<void* const*>(base + at_row + at_grads);
    args.hyper = reinterpret_cast<const double*>(base + at_row + at_hyper);
    args.live = live.empty() ? nullptr : reinterpret_cast<const int64_t*>(base + at_fixed + at_live);
    args.found = reinterpret_cast<Measures*>(base + at_found);
    args.counters = reinterpret_cast<int32_t*>(base + at_counters);
    args.largest = reinterpret_cast<int64_t*>(base + at_largest);
    args.factors = reinterpret_cast<double*>(base + at_factors);
    args.squared = reinterpret_cast<double*>(base + at_squared);
    args.tensors = int64_t(n);
    at_hyper_ = at_hyper;
    fixed_ = std::make_unique<Upload>(driver, Address(base + at_fixed), fixed.bytes());
    row_ = std::make_unique<Upload>(driver, Address(base + at_row), row.bytes());
    char* const host = static_cast<char*>(fixed_->host(stream));
    std::memcpy(host + at_entries, entries.data(), n * sizeof(Entry));
    std::memcpy(host + at_owners, owners.data(), owners.size() * sizeof(int32_t));
    std::memcpy(host + at_live, live.data(), live.size() * sizeof(int64_t));
    fixed_->send(stream);
  }

  // Sends what a step brings. grad: the address of a gradient by its index.
  template <class Grad>
  void send(const Tensor& hyper, const Grad& grad, void* stream) {
    char* const host = static_cast<char*>(row_->host(stream));
    void** const grads = reinterpret_cast<void**>(host);
    for (int64_t i = 0; i < args.tensors; ++i) grads[i] = grad(i);
    if (hyper.defined()) std::memcpy(host + at_hyper_, hyper.const_data_ptr(), hyper.nbytes());
    row_->send(stream);
  }

  Tensor squared_sum() const {
    const int64_t at = int64_t(reinterpret_cast<const char*>(args.squared + args.tensors) -
                               static_cast<const char*>(memory_.const_data_ptr()));
    return memory_.slice(0, at, at + int64_t(sizeof(double))).view(at::kDouble).squeeze(0).clone();
  }

  const Tensor& memory() const { return memory_; }

  Args args{};

 private:
  Tensor memory_;
  size_t at_hyper_;
  std::unique_ptr<Upload> fixed_, row_;
};

// The kernels that serve a tensor, by the end of their names. f32_anchor16: as f32, beside an anchor in bf16.
enum class Family : uint8_t { f32, f32_anchor16, bf16, any, any8, any64 };
constexpr const char* kFamilies[] = {"f32", "f32_anchor16", "bf16", "any", "any8", "any64"};
constexpr unsigned threads_of(Family family) { return family == Family::any64 ? kThreads64 : kThreads; }

template <class Hyper>
class CudaStep {
 public:
  CudaStep(const char* base, const py::object& table, int device)
      : base_(base), device_(device), table_(table, place(), kColumns) {
    for (const auto& [at, tensor] : table.attr("live").cast<std::map<int64_t, Tensor>>()) {
      if (live_.empty()) live_.resize(table_.hyper.numel());
      TORCH_CHECK(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble,
                  "robustft: a hyper-parameter in a tensor must be Float or Double, got ", described(tensor));
      live_[at] = int64_t(tensor.const_data_ptr()) + (tensor.scalar_type() == at::kDouble);
      held_live_.push_back(tensor);
    }
    // Every tensor is checked here, where nothing has been written.
    for (size_t i = 0; i < table_.size(); ++i) {
      Param p;
      table_.bind(i, p);
    }
  }

  void run(const std::optional<py::list>& given, const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
           uint64_t raw_stream) {
    void* const stream = reinterpret_cast<void*>(raw_stream);
    const Gradients grads = table_.gradients(given);
    const bool none = grads.empty() && !kMoves;
    if (!none) table_.check_count(grads.size());
    const In context(driver_, Kernels::get().context(device_));
    std::optional<Plan>& plan = none ? alone_ : graded_;
    if (!plan) plan.emplace(planned(grads, none, stream));
    const int64_t n = int64_t(table_.size());
    plan->table.send(table_.hyper, [&](int64_t i) {
      if (none) return static_cast<void*>(nullptr);
      if (i + 8 < n) expect(grads[i + 8]);  // headers of many tensors are scattered
      if (i + 4 < n) expect_storage(grads[i + 4]);
      return address(*plan, i, grads);
    }, stream);
    const Tensor scale = as_float(grad_scale), inf = as_float(found_inf);
    for (Launch& launch : plan->launches) {
      launch.args.grad_scale = scale.defined() ? scale.const_data_ptr<float>() : nullptr;
      launch.args.found_inf = inf.defined() ? inf.const_data_ptr<float>() : nullptr;
      start(launch, stream);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (i + 8 < n) expect(table_[i + 8].param);
      if (kMoves || table_[i].rule->pulls) bump_version(table_[i].param);
    }
  }

  // What it has on the device beside the caller's tensors.
  Tensors memory() const {
    Tensors all;
    for (const std::optional<Plan>* plan : {&graded_, &alone_, &norm_}) {
      if (!*plan) continue;
      all.push_back((*plan)->table.memory());
      for (const auto& [index, room] : (*plan)->relaid) all.push_back(room);
    }
    return all;
  }

  // The sum of the squares of all gradients, a float64 on the device.
  Tensor squared_norm(const std::optional<py::list>& given, uint64_t raw_stream) {
    void* const stream = reinterpret_cast<void*>(raw_stream);
    const Gradients grads = table_.gradients(given);
    table_.check_count(grads.size());
    const In context(driver_, Kernels::get().context(device_));
    if (!norm_) norm_.emplace(planned_norm(grads, stream));
    norm_->table.send({}, [&](int64_t i) { return address(*norm_, i, grads); }, stream);
    for (const Launch& launch : norm_->launches) start(launch, stream);
    return norm_->table.squared_sum();
  }

 private:
  static constexpr bool kMoves = !std::is_same_v<Hyper, NoStepHyper>;
  static constexpr int64_t kColumns = sizeof(Hyper) / sizeof(double);

  struct Plan {
    DeviceTable table;
    std::vector<Launch> launches;
    std::map<int64_t, Tensor> relaid;  // room for gradients that do not lie as their parameters do
  };
  // Programs that one launch runs, of tensors alike.
  struct Class {
    std::vector<size_t> later, others;  // tensors: those that sweep 2 may pull, and the others
    bool surveys = false;
    size_t first = 0, pulled = 0, programs = 0;
  };

  at::Device place() const { return Kernels::get().feigned() ? at::Device(at::kCPU) : at::Device(at::kCUDA, device_); }

  static void* address(Plan& plan, int64_t i, const Gradients& grads) {
    const Tensor& grad = grads[i];
    if (C10_UNLIKELY(!plan.relaid.empty()))
      if (const auto found = plan.relaid.find(i); found != plan.relaid.end())
        return found->second.copy_(grad).data_ptr();
    return const_cast<void*>(grad.const_data_ptr());
  }
  static Tensor as_float(const std::optional<Tensor>& number) {
    return !number ? Tensor() : number->scalar_type() == at::kFloat ? *number : number->to(at::kFloat);
  }

  // The kernels for plain tensors know their dtypes, and lack all that only some tensors need.
  Family family_of(const Held& held, const Param& p, bool none) const {
    const Rule& rule = *held.rule;
    const bool known = rule.pulls && rule.measuring == Measuring::none, penalty = rule.linear || rule.sign;
    if (p.param.dtype == DType::f64) return Family::any64;
    if (p.coded_state) return Family::any8;
    if (!kMoves || none || known || penalty || rule.tracks || rule.crosses_rows() ||
        p.dithered || p.low_state || p.working.data || p.state[kStates - 1].data)
      return Family::any;
    const DType dtype = p.param.dtype, anchor = p.anchor.data ? p.anchor.dtype : dtype;
    if (p.grad.dtype != dtype) return Family::any;
    if (dtype == DType::f32)
      return anchor == dtype ? Family::f32 : anchor == DType::bf16 ? Family::f32_anchor16 : Family::any;
    return dtype == DType::bf16 && anchor == dtype ? Family::bf16 : Family::any;
  }

  Plan planned(const Gradients& grads, bool none, void* stream) {
    const size_t n = table_.size();
    std::vector<Entry> entries(n);
    std::map<std::pair<Family, bool>, Class> classes;
    std::map<int64_t, Tensor> relaid;
    size_t found = 0;
    for (size_t i = 0; i < n; ++i) {
      const Held& held = table_[i];
      Entry& e = entries[i];
      e.param = table_.param_of(i);
      e.rule = *held.rule;
      table_.bind(i, e.param);
      if (!none) {
        Tensor room;
        e.param.grad = table_.grad(i, grads[i], room);
        if (room.defined()) relaid.emplace(i, room);
      }
      const bool by_rows = held.rule->crosses_rows();
      const Pieces pieces(e.param.rows);
      e.programs = int32_t(std::max<int64_t>(1, pieces.count()));
      e.hyper = held.row * kColumns;
      e.segment = held.first;
      e.found = int64_t(found);
      found += by_rows ? pieces.found() : e.programs;
      e.step = held.step.defined() ? static_cast<float*>(held.step.data_ptr()) : nullptr;
      e.learned = held.learned.defined() ? static_cast<double*>(held.learned.data_ptr()) : nullptr;
      Class& of = classes[{family_of(held, e.param, none), by_rows}];
      const bool waits = held.rule->measuring != Measuring::none && held.rule->pulls && e.programs > 1;
      const bool later = waits && !held.rule->pulls_at_once(pieces);
      (later ? of.later : of.others).push_back(i);
      of.surveys |= held.rule->survey != Survey::none;
    }
    std::vector<int32_t> owners;
    for (auto& [key, of] : classes) {
      of.first = owners.size();
      for (const std::vector<size_t>* tensors : {&of.later, &of.others}) {
        for (const size_t i : *tensors) {
          entries[i].program = int32_t(owners.size() - of.first);
          owners.insert(owners.end(), entries[i].programs, int32_t(i));
        }
        if (tensors == &of.later) of.pulled = owners.size() - of.first;
      }
      of.programs = owners.size() - of.first;
    }
    Plan plan{{driver_, place(), entries, owners, live_, size_t(table_.hyper.numel()), found, stream}, {}, relaid};
    Args args = plan.table.args;
    args.results = static_cast<double*>(table_.results.data_ptr());
    args.alphas = static_cast<double*>(table_.alphas.data_ptr());
    args.graded = !none;
    std::vector<Launch> pulls;
    for (const auto& [key, of] : classes) {
      const auto [family, by_rows] = key;
      const std::string kind = kFamilies[int(family)], name = base_ + "_" + kind;
      const Family wide = family == Family::any64 ? family : Family::any;
      args.owners = plan.table.args.owners + of.first;
      const auto launch = [&](const std::string& kernel, size_t programs, Family on) {
        return Launch{Kernels::get().function(device_, kernel), unsigned(programs), threads_of(on), args};
      };
      if (of.surveys) plan.launches.push_back(launch("survey_" + base_ + "_" + kFamilies[int(wide)], of.programs, wide));
      plan.launches.push_back(launch((by_rows ? "rows_" : "step_") + name, of.programs, family));
      if (of.pulled) pulls.push_back(launch(std::string("pull_") + kFamilies[int(wide)], of.pulled, wide));
    }
    plan.launches.insert(plan.launches.end(), pulls.begin(), pulls.end());
    return plan;
  }

  Plan planned_norm(const Gradients& grads, void* stream) {
    const size_t n = table_.size();
    std::vector<Entry> entries(n);
    std::vector<int32_t> owners;
    std::map<int64_t, Tensor> relaid;
    size_t found = 0, firsts[3] = {0};
    int launches = 0;
    for (const bool is_double : {false, true}) {
      for (size_t i = 0; i < n; ++i) {
        Tensor room;
        Entry& e = entries[i];
        const Buffer grad = table_.grad(i, grads[i], room);
        if ((grad.dtype == DType::f64) != is_double) continue;
        if (room.defined()) relaid.emplace(i, room);
        e.param.param = grad;
        e.param.rows = rows_of(table_[i].param, false);
        e.programs = int32_t(Pieces(e.param.rows).count());
        e.program = int32_t(owners.size() - firsts[launches]);
        e.found = int64_t(found);
        found += e.programs;
        owners.insert(owners.end(), e.programs, int32_t(i));
      }
      firsts[++launches] = owners.size();
    }
    Plan plan{{driver_, place(), entries, owners, {}, 0, found, stream}, {}, relaid};
    for (int k = 0; k < 2; ++k) {
      if (firsts[k + 1] == firsts[k]) continue;
      const Family family = k ? Family::any64 : Family::any;
      Args args = plan.table.args;
      args.owners += firsts[k];
      plan.launches.push_back({Kernels::get().function(device_, std::string("norm_") + kFamilies[int(family)]),
                               unsigned(firsts[k + 1] - firsts[k]), threads_of(family), args});
    }
    return plan;
  }

  void start(const Launch& launch, void* stream) {
    void* parameters[] = {const_cast<Args*>(&launch.args)};
    driver_.check(driver_.cuLaunchKernel(launch.function, launch.programs, 1, 1, launch.threads, 1, 1, 0, stream,
                                         parameters, nullptr),
                  "launch a kernel");
  }

  const std::string base_;
  const int device_;
  const Driver& driver_ = Kernels::get().driver();
  const Table table_;
  std::vector<int64_t> live_;
  Tensors held_live_;
  std::optional<Plan> graded_, alone_, norm_;
};

}  // namespace robustft::cuda
