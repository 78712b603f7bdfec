// The simulated CUDA driver, as Triton and torch call it: by the simulated runtime.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))
// The runtime is in another library, which this one does not link.
#define RUNTIME(name) ((decltype(&name))dlsym(RTLD_DEFAULT, #name))

static CUresult result(cudaError_t error) { return CUresult(error); }

EXPORT CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetCount(int* count) { return result(RUNTIME(cudaGetDeviceCount)(count)); }
EXPORT CUresult cuDeviceGet(CUdevice* device, int index) { return *device = index, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetName(char* name, int size, CUdevice) {
  snprintf(name, size, "simulated GPU");
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return result(RUNTIME(cudaDeviceGetAttribute)(value, cudaDeviceAttr(attribute), device));
}

// A context is the number of its device, plus one.
static int current_device() {
  int device = 0;
  RUNTIME(cudaGetDevice)(&device);
  return device;
}
static CUcontext context_of(int device) { return CUcontext(size_t(device + 1)); }
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* is_active) {
  if (flags) *flags = 0;
  return *is_active = 1, CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = context_of(device), CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) {
  return *context = context_of(current_device()), CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
  return *device = current_device(), CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
  if (context) RUNTIME(cudaSetDevice)(int(size_t(context)) - 1);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorString(CUresult error, const char** text) {
  return *text = RUNTIME(cudaGetErrorName)(cudaError_t(error)), CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorName(CUresult error, const char** text) {
  return cuGetErrorString(error, text);
}

EXPORT CUresult cuModuleLoadData(CUmodule* module, const void*) {
  return *module = CUmodule(1), CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoadDataEx(
    CUmodule* module, const void*, unsigned, CUjit_option*, void**) {
  return *module = CUmodule(1), CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  return *function = CUfunction(strdup(name)), CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  bool is_threads = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
  *value = is_threads ? 1024 : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuPointerGetAttribute(
    void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  cudaPointerAttributes found;
  RUNTIME(cudaPointerGetAttributes)(&found, (void*)pointer);
  if (found.type == cudaMemoryTypeUnregistered) return CUDA_ERROR_INVALID_VALUE;
  bool is_device = found.type == cudaMemoryTypeDevice;
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr*)value = pointer; break;
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext*)value = context_of(found.device); break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *(unsigned*)value = is_device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
      break;
    default: *(int*)value = found.device;
  }
  return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, CUfunction, int, size_t) {
  return *count = 2, CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig*) {
  return *count = 1, CUDA_SUCCESS;
}

static CUresult launch(
    CUfunction function, dim3 grid, dim3 block, unsigned shared, CUstream stream) {
  return result(RUNTIME(cudaLaunchKernel)(
      (const void*)function, grid, block, nullptr, shared, cudaStream_t(stream)));
}
EXPORT CUresult cuLaunchKernel(
    CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
    unsigned bz, unsigned shared, CUstream stream, void**, void**) {
  return launch(function, dim3(gx, gy, gz), dim3(bx, by, bz), shared, stream);
}
EXPORT CUresult cuLaunchCooperativeKernel(
    CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
    unsigned bz, unsigned shared, CUstream stream, void**) {
  return launch(function, dim3(gx, gy, gz), dim3(bx, by, bz), shared, stream);
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void**, void**) {
  dim3 grid(c->gridDimX, c->gridDimY, c->gridDimZ), block(c->blockDimX, c->blockDimY, c->blockDimZ);
  return launch(function, grid, block, c->sharedMemBytes, c->hStream);
}

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr* pointer, size_t size) {
  return result(RUNTIME(cudaMalloc)((void**)pointer, size));
}
EXPORT CUresult cuMemFree_v2(CUdeviceptr pointer) {
  return result(RUNTIME(cudaFree)((void*)pointer));
}
EXPORT CUresult cuMemcpyDtoHAsync_v2(
    void* target, CUdeviceptr source, size_t size, CUstream stream) {
  return result(RUNTIME(cudaMemcpyAsync)(
      target, (void*)source, size, cudaMemcpyDeviceToHost, cudaStream_t(stream)));
}
EXPORT CUresult cuMemsetD32Async(CUdeviceptr target, unsigned value, size_t count, CUstream) {
  for (size_t i = 0; i < count; ++i) ((unsigned*)target)[i] = value;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamSynchronize(CUstream stream) {
  return result(RUNTIME(cudaStreamSynchronize)(cudaStream_t(stream)));
}
EXPORT CUresult cuGetProcAddress_v2(
    const char* name, void** function, int, cuuint64_t, CUdriverProcAddressQueryResult* found) {
  cudaDriverEntryPointQueryResult result;
  RUNTIME(cudaGetDriverEntryPointByVersion)(name, function, 0, 0, &result);
  if (found) *found = CUdriverProcAddressQueryResult(result);
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
