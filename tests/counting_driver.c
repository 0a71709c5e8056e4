// A driver of CUDA that does nothing but count, for measuring what the host needs. Device memory is the host's.
#include <stdlib.h>
#include <string.h>

static int launches, copies, made;
int counted_launches(void) { return launches; }
int counted_copies(void) { return copies; }
int counted_allocations(void) { return made; }  // of pinned memory and events

int cuGetErrorName(int status, const char** name) { return *name = "none", 0; }
int cuCtxGetCurrent(void** context) { return *context = (void*)1, 0; }
int cuCtxSetCurrent(void* context) { return 0; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)1, 0; }
int cuModuleLoadData(void** module, const void* image) { return *module = (void*)1, 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { return *function = (void*)1, 0; }
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned more, unsigned most,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  return ++launches, 0;
}
int cuMemHostAlloc(void** memory, size_t size, unsigned flags) { return *memory = malloc(size), ++made, 0; }
int cuMemFreeHost(void* memory) { return free(memory), 0; }
int cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, size_t size, void* stream) {
  return memcpy((void*)to, from, size), ++copies, 0;
}
int cuEventCreate(void** event, unsigned flags) { return *event = (void*)1, ++made, 0; }
int cuEventRecord(void* event, void* stream) { return 0; }
int cuEventQuery(void* event) { return 0; }
int cuEventDestroy_v2(void* event) { return 0; }
int cuStreamIsCapturing(void* stream, int* capturing) { return *capturing = 0, 0; }
