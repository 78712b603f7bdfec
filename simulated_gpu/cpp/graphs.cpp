// Graphs and kernels of the simulated CUDA runtime. A kernel does nothing: compute.py computes.
#include <dlfcn.h>

#include <cstring>

#include "state.h"

namespace simulated {
std::set<Graph*> graphs;
}
using namespace simulated;

namespace {
std::map<const void*, std::string> kernels;
struct UserObject {
  void* data;
  cudaHostFn_t destroy;
};
}  // namespace

EXPORT cudaError_t cudaGraphInstantiateWithFlags(
    cudaGraphExec_t* result, cudaGraph_t handle, unsigned long long) {
  LOCK;
  if (!graphs.count((Graph*)handle)) FINISH(cudaErrorInvalidValue);
  Graph* copy = new Graph(*(Graph*)handle);
  copy->owned.clear();
  graphs.insert(copy);
  *result = cudaGraphExec_t(copy);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  LOCK;
  if (!graphs.count((Graph*)graph)) FINISH(cudaErrorInvalidValue);
  FINISH(enqueue(stream, __func__));
}
EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t handle) {
  LOCK;
  Graph* graph = (Graph*)handle;
  if (!graphs.erase(graph)) FINISH(cudaErrorInvalidValue);
  for (auto& [data, destroy] : graph->owned) destroy(data);
  delete graph;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  return cudaGraphDestroy(cudaGraph_t(graph));
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  return *count = ((Graph*)graph)->nodes.size(), cudaSuccess;
}
EXPORT cudaError_t cudaGraphNodeGetDependencies(
    cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* count) {
  return *count = 0, cudaSuccess;
}
EXPORT cudaError_t cudaUserObjectCreate(
    cudaUserObject_t* result, void* data, cudaHostFn_t destroy, unsigned, unsigned) {
  return *result = cudaUserObject_t(new UserObject{data, destroy}), cudaSuccess;
}
EXPORT cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }
EXPORT cudaError_t cudaGraphRetainUserObject(
    cudaGraph_t graph, cudaUserObject_t object, unsigned, unsigned) {
  UserObject* owned = (UserObject*)object;
  ((Graph*)graph)->owned.push_back({owned->data, owned->destroy});
  return cudaSuccess;
}

EXPORT void** __cudaRegisterFatBinary(void* binary) { return (void**)new void*(binary); }
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterFunction(void**, const char* function, char*, const char* name) {
  LOCK;
  kernels[function] = name;
}
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORT char __cudaInitModule(void**) { return 1; }

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
static thread_local Configuration configuration;
EXPORT unsigned __cudaPushCallConfiguration(
    dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(
    dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  *(void**)stream = configuration.stream;
  return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return *kernel = cudaKernel_t(function), cudaSuccess;
}

static cudaError_t launch(
    const void* function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  LOCK;
  bool is_empty = !grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z;
  size_t threads = size_t(block.x) * block.y * block.z;
  if (is_empty || grid.y > 65535 || grid.z > 65535 || threads > 1024)
    return cudaErrorInvalidConfiguration;
  if (shared > size_t(shared_memory())) return cudaErrorInvalidValue;
  if (!is_legacy(stream) && is_stream(stream) && find(stream)->device != device)
    return cudaErrorInvalidResourceHandle;
  auto kernel = kernels.find(function);
  return enqueue(stream, kernel == kernels.end() ? "a kernel" : kernel->second.c_str());
}
EXPORT cudaError_t cudaLaunchKernel(
    const void* function, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  FINISH(launch(function, grid, block, shared, stream));
}
EXPORT cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  FINISH(launch((const void*)kernel, grid, block, shared, stream));
}
EXPORT cudaError_t cudaLaunchKernelExC(
    const cudaLaunchConfig_t* c, const void* function, void**) {
  FINISH(launch(function, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream));
}

EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024, attributes->numRegs = 64;
  attributes->binaryVersion = attributes->ptxVersion = capability();
  attributes->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}
EXPORT cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  FINISH(value > shared_memory() ? cudaErrorInvalidValue : cudaSuccess);
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(
    int* count, const void*, int, size_t) {
  return *count = 2, cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* count, const void*, int, size_t, unsigned) {
  return *count = 2, cudaSuccess;
}
EXPORT cudaError_t cudaLibraryLoadData(
    cudaLibrary_t* library, const void*, cudaJitOption*, void**, unsigned, cudaLibraryOption*,
    void**, unsigned) {
  return *library = cudaLibrary_t(1), cudaSuccess;
}
EXPORT cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t, const char*) {
  return *kernel = cudaKernel_t(1), cudaSuccess;
}

// A function of the driver by name; those of later versions end in _v2.
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long,
    cudaDriverEntryPointQueryResult* result) {
  static void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_GLOBAL);
  *function = driver ? dlsym(driver, name) : nullptr;
  if (driver && !*function) *function = dlsym(driver, (std::string(name) + "_v2").c_str());
  if (result)
    *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
