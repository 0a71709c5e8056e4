// Driver: what a step needs of CUDA's driver. It is found when the program runs, so nothing of CUDA is needed to build
// or to import this.
#pragma once

#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

namespace robustft::cuda {

using Address = unsigned long long;

// Name, and the types of the arguments, as in "CUDA Driver API". Contexts, modules, functions, events and streams are
// pointers.
#define ROBUSTFT_DRIVER(X) \
  X(cuGetErrorName, int, const char**) \
  X(cuCtxGetCurrent, void**) \
  X(cuCtxSetCurrent, void*) \
  X(cuDeviceGet, int*, int) \
  X(cuDevicePrimaryCtxRetain, void**, int) \
  X(cuModuleLoadData, void**, const void*) \
  X(cuModuleGetFunction, void**, void*, const char*) \
  X(cuLaunchKernel, void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**) \
  X(cuMemHostAlloc, void**, size_t, unsigned) \
  X(cuMemFreeHost, void*) \
  X(cuMemcpyHtoDAsync_v2, Address, const void*, size_t, void*) \
  X(cuEventCreate, void**, unsigned) \
  X(cuEventRecord, void*, void*) \
  X(cuEventQuery, void*) \
  X(cuEventDestroy_v2, void*) \
  X(cuStreamIsCapturing, void*, int*)

struct Driver {
#define ROBUSTFT_FUNCTION(name, ...) int (*name)(__VA_ARGS__) = nullptr;
  ROBUSTFT_DRIVER(ROBUSTFT_FUNCTION)
#undef ROBUSTFT_FUNCTION

  // The library's functions. Raises RuntimeError naming what is missing.
  static Driver loaded() {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW);
    TORCH_CHECK(library, "robustft: CUDA's driver cannot be loaded (", dlerror(), ")");
    return found([&](const char* name) { return dlsym(library, name); });
  }
  // The functions that `at` has, by their names.
  template <class At>
  static Driver found(const At& at) {
    Driver driver;
#define ROBUSTFT_FIND(name, ...) \
  driver.name = reinterpret_cast<int (*)(__VA_ARGS__)>(at(#name)); \
  TORCH_CHECK(driver.name, "robustft: CUDA's driver has no function " #name);
    ROBUSTFT_DRIVER(ROBUSTFT_FIND)
#undef ROBUSTFT_FIND
    return driver;
  }

  void check(int status, const char* what) const {
    if (status == 0) return;
    const char* name = nullptr;
    if (cuGetErrorName) cuGetErrorName(status, &name);
    TORCH_CHECK(false, "robustft: CUDA's driver cannot ", what, ": ", name ? name : std::to_string(status).c_str());
  }
};

// The kernels of this process: the image that they are loaded from, and on each GPU their functions.
class Kernels {
 public:
  static Kernels& get() {
    static Kernels* const kernels = new Kernels;  // never destroyed, as the driver may be gone by then
    return *kernels;
  }

  // image: a fat binary. signature: a kernel that it must have. driver: which functions to call, or those of the library.
  void use(std::string image, const char* signature, std::optional<Driver> driver) {
    image_ = std::move(image);
    signature_ = signature;
    devices_.clear();
    if (driver) driver_ = *driver;
    ready_ = feigned_ = driver.has_value();
  }
  const Driver& driver() {
    if (!ready_) driver_ = Driver::loaded();
    ready_ = true;
    return driver_;
  }
  // Whether the driver is not the library's. Its device memory is the host's.
  bool feigned() const { return feigned_; }
  void* context(int device) { return on(device).context; }
  // A kernel's function on a GPU, in the context that torch uses there.
  void* function(int device, const std::string& name) {
    Device& here = on(device);
    void*& function = here.functions[name];
    if (!function) driver().check(driver().cuModuleGetFunction(&function, here.module, name.c_str()), "find a kernel");
    return function;
  }

 private:
  struct Device {
    void *context = nullptr, *module = nullptr;
    std::map<std::string, void*> functions;
  };

  Device& on(int index) {
    const auto [place, is_new] = devices_.try_emplace(index);
    Device& of = place->second;
    if (of.module) return of;
    try {
      int device;
      void* before;
      const Driver& d = driver();
      d.check(d.cuDeviceGet(&device, index), "find the GPU");
      d.check(d.cuDevicePrimaryCtxRetain(&of.context, device), "start on the GPU");
      d.check(d.cuCtxGetCurrent(&before), "tell its context");
      d.check(d.cuCtxSetCurrent(of.context), "change its context");
      void* signature;
      const int loaded = d.cuModuleLoadData(&of.module, image_.data());
      const int signed_ = loaded ? 0 : d.cuModuleGetFunction(&signature, of.module, signature_);
      d.cuCtxSetCurrent(before);
      d.check(loaded, "load the kernels, which were compiled for other GPUs or a newer driver");
      TORCH_CHECK(signed_ == 0, "robustft: the CUDA kernels were compiled from other sources; reinstall");
    } catch (...) {
      devices_.erase(index);
      throw;
    }
    return of;
  }

  std::string image_;
  const char* signature_ = "";
  Driver driver_;
  bool ready_ = false, feigned_ = false;
  std::map<int, Device> devices_;
};

// Makes a GPU's context the current one of this thread, for a while.
class In {
 public:
  In(const Driver& driver, void* context) : driver_(driver) {
    driver_.check(driver_.cuCtxGetCurrent(&before_), "tell its context");
    if (before_ == context) return;
    driver_.check(driver_.cuCtxSetCurrent(context), "change its context");
    changed_ = true;
  }
  ~In() {
    if (changed_) driver_.cuCtxSetCurrent(before_);
  }
  In(const In&) = delete;

 private:
  const Driver& driver_;
  void* before_ = nullptr;
  bool changed_ = false;
};

}  // namespace robustft::cuda
