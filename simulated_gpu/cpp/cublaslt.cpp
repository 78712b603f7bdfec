// The simulated cuBLASLt: one algorithm for every product, which is enqueued.
#include "library.h"

struct HeuristicResult {  // as in cublasLt.h
  unsigned long long algorithm[8];
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};
constexpr int EXECUTION_FAILED = 13, DESCRIPTOR_BYTES = 256;

static int make(void** object) { return *object = calloc(1, DESCRIPTOR_BYTES), 0; }
static int end(void* object) { return free(object), 0; }
EXPORT int cublasLtCreate(void** handle) { return make(handle); }
EXPORT int cublasLtMatmulDescCreate(void** object) { return make(object); }
EXPORT int cublasLtMatmulDescDestroy(void* object) { return end(object); }
EXPORT int cublasLtMatrixLayoutCreate(void** object) { return make(object); }
EXPORT int cublasLtMatrixLayoutDestroy(void* object) { return end(object); }
EXPORT int cublasLtMatmulPreferenceCreate(void** object) { return make(object); }
EXPORT int cublasLtMatmulPreferenceDestroy(void* object) { return end(object); }
EXPORT size_t cublasLtGetVersion() { return 130100; }
EXPORT int cublasLtMatmulAlgoGetHeuristic(
    void*, void*, void*, void*, void*, void*, void*, int, HeuristicResult* results, int* count) {
  memset(results, 0, sizeof *results);
  results->waves = 1;
  return *count = 1, 0;
}
EXPORT int cublasLtMatmul(
    void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*,
    void*, void*, void*, const void*, void*, size_t, cudaStream_t stream) {
  return enqueue(stream, "cublasLtMatmul") ? EXECUTION_FAILED : 0;
}
