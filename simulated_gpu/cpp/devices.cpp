// Devices, errors and settings of the simulated CUDA runtime.
#include <cstring>

#include "state.h"

namespace simulated {

std::recursive_mutex lock;
thread_local int device = 0;
static thread_local cudaError_t last_error = cudaSuccess;

static int setting(const char* name, int standard) {
  const char* text = getenv(name);
  return text ? atoi(text) : standard;
}

int device_count() {
  static int count = setting("SIMULATED_GPUS", 1);
  return count;
}

int capability() {
  static int value = setting("SIMULATED_CAPABILITY", 90);
  return value;
}

size_t memory_size() {
  static size_t size = size_t(setting("SIMULATED_MIB", 16384)) << 20;
  return size;
}

bool is_traced() {
  static bool traced = getenv("SIMULATED_TRACE") != nullptr;
  return traced;
}

int shared_memory() {
  return capability() >= 90 ? 232448 : capability() == 80 ? 166912 : 65536;
}

const void* this_thread() {
  static thread_local char address;
  return &address;
}

const char* name(cudaError_t error) {
  static thread_local char text[64];
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureImplicit: return "cudaErrorStreamCaptureImplicit";
    case cudaErrorStreamCaptureUnjoined: return "cudaErrorStreamCaptureUnjoined";
    case cudaErrorStreamCaptureIsolation: return "cudaErrorStreamCaptureIsolation";
    case cudaErrorCapturedEvent: return "cudaErrorCapturedEvent";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    default: snprintf(text, sizeof text, "cudaError%d", int(error)); return text;
  }
}

cudaError_t finish(cudaError_t error, const char* function) {
  if (error == cudaSuccess) return error;
  last_error = error;
  if (is_traced()) fprintf(stderr, "[simulated] %s: %s\n", function, name(error));
  return error;
}

}  // namespace simulated

using namespace simulated;

EXPORT cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }
EXPORT const char* cudaGetErrorName(cudaError_t error) { return name(error); }
EXPORT const char* cudaGetErrorString(cudaError_t error) { return name(error); }
EXPORT cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
EXPORT cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
EXPORT cudaError_t cudaProfilerStart() { return cudaSuccess; }
EXPORT cudaError_t cudaProfilerStop() { return cudaSuccess; }
EXPORT cudaError_t cudaGetDeviceCount(int* count) {
  return *count = device_count(), cudaSuccess;
}
EXPORT cudaError_t cudaGetDevice(int* index) { return *index = device, cudaSuccess; }
EXPORT cudaError_t cudaSetDevice(int index) {
  if (index < 0 || index >= device_count()) FINISH(cudaErrorInvalidDevice);
  device = index;
  return cudaSuccess;
}

static int multiprocessors() {
  return capability() == 75 ? 40 : capability() == 80 ? 108 : 132;
}
static int threads_of_multiprocessor() { return capability() == 75 ? 1024 : 2048; }

EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int index) {
  if (index < 0 || index >= device_count()) FINISH(cudaErrorInvalidDevice);
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "simulated GPU sm_%d", capability());
  p->uuid.bytes[0] = char(index + 1);
  p->pciBusID = index + 1;
  p->major = capability() / 10, p->minor = capability() % 10;
  p->totalGlobalMem = memory_size();
  p->multiProcessorCount = multiprocessors();
  p->maxThreadsPerMultiProcessor = threads_of_multiprocessor();
  p->maxBlocksPerMultiProcessor = p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 49152, p->reservedSharedMemPerBlock = 1024;
  p->sharedMemPerBlockOptin = shared_memory();
  p->sharedMemPerMultiprocessor = shared_memory() + 1024;
  p->totalConstMem = 65536, p->memPitch = 2147483647, p->textureAlignment = 512;
  p->l2CacheSize = 50 << 20, p->memoryBusWidth = 5120, p->asyncEngineCount = 3;
  p->concurrentKernels = p->unifiedAddressing = p->canMapHostMemory = p->managedMemory = 1;
  p->streamPrioritiesSupported = p->cooperativeLaunch = p->memoryPoolsSupported = 1;
  p->clusterLaunch = capability() >= 90;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  if (index < 0 || index >= device_count()) FINISH(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    case cudaDevAttrMultiProcessorCount: *value = multiprocessors(); break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = threads_of_multiprocessor(); break;
    case cudaDevAttrComputeCapabilityMajor: *value = capability() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability() % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared_memory(); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = shared_memory() + 1024; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrClockRate: *value = 1980000; break;        // kHz
    case cudaDevAttrMemoryClockRate: *value = 3200000; break;  // kHz
    case cudaDevAttrGlobalMemoryBusWidth: *value = 5120; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrCooperativeLaunch: case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrMemoryPoolsSupported: *value = 1; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int index) {
  snprintf(text, size, "0000:%02d:00.0", index + 1);
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int* value, int first, int second) {
  return *value = first != second, cudaSuccess;
}
EXPORT cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
EXPORT cudaError_t cudaDeviceSynchronize() {
  LOCK;
  CHECK(check_unsafe(__func__));
  // In whatever mode it is: the device encompasses its streams.
  for (Capture* capture : captures)
    for (Stream* stream : capture->streams)
      if (stream->device == device) {
        capture->is_invalid = true;
        FINISH(cudaErrorStreamCaptureUnsupported);
      }
  complete_device(device);
  return cudaSuccess;
}
