// What the simulated libraries of CUDA share: their work is enqueued in the simulated runtime.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Adds an operation to a stream; 0, or an error of the runtime.
inline int enqueue(cudaStream_t stream, const char* operation) {
  using Function = int (*)(cudaStream_t, const char*);
  static Function function = (Function)dlsym(RTLD_DEFAULT, "simulated_enqueue");
  return function(stream, operation);
}
