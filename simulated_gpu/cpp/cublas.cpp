// The simulated cuBLAS: handles keep what torch sets, products are enqueued.
#include "library.h"

struct Handle {
  cudaStream_t stream = nullptr;
  int math_mode = 0, pointer_mode = 0;
};
constexpr int EXECUTION_FAILED = 13;

EXPORT int cublasCreate_v2(Handle** handle) { return *handle = new Handle(), 0; }
EXPORT int cublasDestroy_v2(Handle* handle) { return delete handle, 0; }
EXPORT int cublasSetStream_v2(Handle* handle, cudaStream_t stream) {
  return handle->stream = stream, 0;
}
EXPORT int cublasGetStream_v2(Handle* handle, cudaStream_t* stream) {
  return *stream = handle->stream, 0;
}
EXPORT int cublasGetMathMode(Handle* handle, int* mode) { return *mode = handle->math_mode, 0; }
EXPORT int cublasSetMathMode(Handle* handle, int mode) { return handle->math_mode = mode, 0; }
EXPORT int cublasGetPointerMode_v2(Handle* handle, int* mode) {
  return *mode = handle->pointer_mode, 0;
}
EXPORT int cublasSetPointerMode_v2(Handle* handle, int mode) {
  return handle->pointer_mode = mode, 0;
}
#define PRODUCT(name) \
  EXPORT int name(Handle* handle) { return enqueue(handle->stream, #name) ? EXECUTION_FAILED : 0; }
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
