// Fingerprint: what a prepared step depends on.
#pragma once

#include <torch/extension.h>

#include <vector>

namespace robustft {

// The part of a DTensor that is here, and the object that says how it is spread. Any other tensor itself, and null.
class Shard {
 public:
  explicit Shard(const at::Tensor& tensor) : whole_(&tensor) {
    if (C10_LIKELY(!tensor.key_set().has(c10::DispatchKey::Python))) return;
    static PyObject* const names[] = {PyUnicode_InternFromString("_local_tensor"), PyUnicode_InternFromString("_spec")};
    const py::object of = py::cast(tensor);
    const auto here = py::reinterpret_steal<py::object>(PyObject_GetAttr(of.ptr(), names[0]));
    if (!here) {
      PyErr_Clear();
      return;
    }
    here_ = THPVariable_Unpack(here.ptr());
    spec = py::reinterpret_steal<py::object>(PyObject_GetAttr(of.ptr(), names[1]));
  }
  const at::Tensor& here() const { return here_.defined() ? here_ : *whole_; }

  py::object spec;

 private:
  const at::Tensor* whole_;
  at::Tensor here_;
};

// Everything that a plan depends on: the parameters, the gradients except for their addresses, and which objects the
// state consists of. As long as it is that of the last step, it is compared as it comes, and nothing is stored.
class Fingerprint {
 public:
  // last: the bytes of an earlier one, or none.
  explicit Fingerprint(py::object last = py::none()) : last_(std::move(last)) {
    if (last_.is_none()) return;
    known_ = reinterpret_cast<const int64_t*>(PyBytes_AS_STRING(last_.ptr()));
    end_ = known_ + PyBytes_GET_SIZE(last_.ptr()) / sizeof(int64_t);
    next_ = known_;
  }

  void add(const at::Tensor& param) {
    const Shard shard(param);
    put(int64_t(param.unsafeGetTensorImpl()));
    put(int64_t(shard.spec.ptr()));
    put(address_of(shard.here()));
    add_metadata(shard.here());
    const at::Tensor& grad = param.grad();
    put(grad.defined());
    if (!grad.defined()) return;
    const Shard of_grad(grad);
    // Most gradients have the very object of their parameter. Others have one that is equal, and new at each step.
    const bool same = of_grad.spec.is(shard.spec) || (of_grad.spec && shard.spec && of_grad.spec.equal(shard.spec));
    put(same ? 0 : of_grad.spec ? py::hash(of_grad.spec) | 1 : 2);
    add_metadata(of_grad.here());
  }
  void add(PyObject* kept, bool addresses) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(kept, &at, &key, &value);) {
      put(int64_t(key)), put(int64_t(value));
      if (addresses && THPVariable_Check(value)) put(address_of(Shard(THPVariable_Unpack(value)).here()));
    }
  }
  // Where a plain tensor is, and in which form. Without its address, the form alone.
  void add_form(const at::Tensor& tensor, bool address) {
    put(tensor.dim());
    put(address ? address_of(tensor) : 0);
    add_metadata(tensor);
  }

  // The very object that was given as the last one, if it is equal.
  py::object bytes() {
    if (next_ && next_ == end_) return last_;
    if (next_) diverge();
    return py::bytes(reinterpret_cast<const char*>(words_.data()), words_.size() * sizeof(int64_t));
  }

 private:
  void put(int64_t word) {
    if (C10_LIKELY(next_ && next_ != end_ && *next_ == word)) return void(++next_);
    if (next_) diverge();
    words_.push_back(word);
  }
  void diverge() { words_.assign(known_, next_), next_ = nullptr; }
  static int64_t address_of(const at::Tensor& t) { return t.has_storage() ? int64_t(t.const_data_ptr()) : 0; }
  void add_metadata(const at::Tensor& t) {
    put(int64_t(t.scalar_type()) << 32 | int64_t(t.layout()) << 16 | int64_t(t.device().type()));
    const bool python = t.key_set().has(c10::DispatchKey::Python);
    put(t.device().index() << 3 | int64_t(python) << 2 | int64_t(t.is_neg()) << 1 | int64_t(t._is_zerotensor()));
    for (int64_t size : t.sizes()) put(size);
    if (t.layout() != at::kStrided) return;
    for (int64_t stride : t.strides()) put(stride);
  }

  py::object last_;
  const int64_t *known_ = nullptr, *end_ = nullptr;
  const int64_t* next_ = nullptr;  // as long as all words are those of the last one
  std::vector<int64_t> words_;
};

}  // namespace robustft
