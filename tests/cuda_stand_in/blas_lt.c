/* libcublasLt.so.13: one algorithm without a workspace for every product. */
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))

typedef struct { /* cublasLtMatmulHeuristicResult_t */
  unsigned long long algorithm[8];
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
} Heuristic;

API size_t cublasLtGetVersion(void) { return 130101; }
API int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                       int wanted, Heuristic *results, int *found) {
  (void)handle, (void)operation, (void)a, (void)b, (void)c, (void)d, (void)preference;
  *found = wanted > 0;
  if (wanted > 0) memset(results, 0, sizeof *results);
  return 0;
}

#define MADE(name) API int name(void **made) { return (*made = calloc(1, 1)) ? 0 : 3; }
#define FREED(name) API int name(void *made) { free(made); return 0; }
#define NOTHING(name) API int name(void) { return 0; }
MADE(cublasLtMatmulDescCreate) FREED(cublasLtMatmulDescDestroy)
MADE(cublasLtMatmulPreferenceCreate) FREED(cublasLtMatmulPreferenceDestroy)
MADE(cublasLtMatrixLayoutCreate) FREED(cublasLtMatrixLayoutDestroy)
NOTHING(cublasLtMatmul) NOTHING(cublasLtMatmulAlgoCheck) NOTHING(cublasLtMatmulAlgoInit)
NOTHING(cublasLtMatmulAlgoConfigGetAttribute) NOTHING(cublasLtMatmulAlgoConfigSetAttribute)
NOTHING(cublasLtMatmulDescSetAttribute) NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatrixLayoutSetAttribute)
