/* libcublas.so.13: matrix products that compute nothing. torch allocates cuBLAS's workspace itself, and gets it as on a
 * card. */
#include <stdlib.h>

#define API __attribute__((visibility("default")))

API int cublasCreate_v2(void **handle) { return (*handle = calloc(1, 1)) ? 0 : 3; }
API int cublasDestroy_v2(void *handle) { free(handle); return 0; }
API int cublasGetPointerMode_v2(void *handle, int *mode) { (void)handle; *mode = 0; return 0; }
API int cublasGetMathMode(void *handle, int *mode) { (void)handle; *mode = 0; return 0; }

#define NOTHING(name) API int name(void) { return 0; }
#define ALL_TYPES(name) NOTHING(cublasS##name) NOTHING(cublasD##name) NOTHING(cublasC##name) NOTHING(cublasZ##name)
NOTHING(cublasSetPointerMode_v2) NOTHING(cublasSetMathMode) NOTHING(cublasSetStream_v2) NOTHING(cublasSetWorkspace_v2)
NOTHING(cublasSetSmCountTarget) NOTHING(cublasGemmEx) NOTHING(cublasGemmStridedBatchedEx) NOTHING(cublasSgemmEx)
NOTHING(cublasDotEx) NOTHING(cublasSdot_v2) NOTHING(cublasDdot_v2) NOTHING(cublasCdotc_v2) NOTHING(cublasCdotu_v2)
NOTHING(cublasZdotc_v2) NOTHING(cublasZdotu_v2)
ALL_TYPES(gemm_v2) ALL_TYPES(gemv_v2) ALL_TYPES(gemmStridedBatched) ALL_TYPES(trsm_v2) ALL_TYPES(trsmBatched)
ALL_TYPES(gelsBatched) ALL_TYPES(geqrfBatched) ALL_TYPES(getrfBatched) ALL_TYPES(getrsBatched)
