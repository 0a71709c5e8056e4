// The C++ side as Python sees it.
#include <torch/extension.h>

#include "robustft_signature.h"  // of setup.py

#include "cpu/step.h"
#include "cuda/step.h"
#include "fingerprint.h"

namespace robustft {
namespace {

using AdamWStep = NativeStep<AdamWHyper>;
using SGDStep = NativeStep<SGDHyper>;
using NoStepStep = NativeStep<NoStepHyper>;

// Makes `image` the kernels of the CUDA backend. functions: of a driver that takes the place of the library's, as
// addresses by their names.
void use_kernels(const py::bytes& image, const std::optional<std::map<std::string, uint64_t>>& functions) {
  std::optional<cuda::Driver> driver;
  if (functions)
    driver = cuda::Driver::found([&](const char* name) {
      const auto found = functions->find(name);
      return found == functions->end() ? nullptr : reinterpret_cast<void*>(found->second);
    });
  cuda::Kernels::get().use(std::string(image), C10_STRINGIZE(ROBUSTFT_SIGNATURE), driver);
}

template <class Hyper>
void add_cuda_step(py::module_& m, const std::string& name, const std::string& base) {
  using Step = cuda::CudaStep<Hyper>;
  py::class_<Step>(m, name.c_str())
      .def("run", &Step::run)
      .def("squared_norm", &Step::squared_norm)
      .def("memory", &Step::memory);
  m.def(("prepare_cuda_" + base).c_str(), [base](const py::object& table, int device) {
    return std::make_unique<Step>(base.c_str(), table, device);
  });
}

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

// As step.fingerprint. Thousands of small tensors are scattered in memory, so headers are prefetched.
py::object fingerprint(const py::list& params, const py::list& kept, bool addresses,
                       const std::optional<py::bytes>& last) {
  Fingerprint all(last ? py::object(*last) : py::none());
  const auto param_at = [&](size_t i) -> const Tensor& {
    PyObject* const param = PyList_GET_ITEM(params.ptr(), i);
    TORCH_CHECK_TYPE(THPVariable_Check(param), "robustft: params[", i, "] is no tensor");
    return THPVariable_Unpack(param);
  };
  for (size_t i = 0, n = params.size(); i < n; ++i) {
    if (i + 12 < n) __builtin_prefetch(PyList_GET_ITEM(params.ptr(), i + 12));
    if (i + 8 < n) expect(param_at(i + 8));
    if (i + 4 < n) expect_storage(param_at(i + 4)), expect(param_at(i + 4).grad());
    all.add(param_at(i));
  }
  for (size_t i = 0, n = kept.size(); i < n; ++i) {
    if (i + 8 < n) __builtin_prefetch(PyList_GET_ITEM(kept.ptr(), i + 8));
    if (i + 4 < n) __builtin_prefetch(reinterpret_cast<PyDictObject*>(PyList_GET_ITEM(kept.ptr(), i + 4))->ma_keys);
    TORCH_CHECK_TYPE(PyDict_Check(PyList_GET_ITEM(kept.ptr(), i)), "robustft: kept[", i, "] is no dict");
    all.add(PyList_GET_ITEM(kept.ptr(), i), addresses);
  }
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
  m.def("prepare_adamw", [](const py::object& table) { return std::make_unique<AdamWStep>(sweeps().adamw, table); });
  m.def("prepare_sgd", [](const py::object& table) { return std::make_unique<SGDStep>(sweeps().sgd, table); });
  m.def("prepare_no_step", [](const py::object& table) { return std::make_unique<NoStepStep>(sweeps().no_step, table); });
  add_cuda_step<AdamWHyper>(m, "CudaAdamWStep", "adamw");
  add_cuda_step<SGDHyper>(m, "CudaSGDStep", "sgd");
  add_cuda_step<NoStepHyper>(m, "CudaNoStepStep", "no_step");
  m.def("use_kernels", &use_kernels, py::arg("image"), py::arg("functions") = py::none());
  m.def("try_kernels", [](int device) { cuda::Kernels::get().context(device); });
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
