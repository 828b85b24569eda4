/* The part of CUDA's documented driver interface (docs.nvidia.com/cuda/cuda-driver-api) that the stand-in answers. */
#ifndef DRIVER_H
#define DRIVER_H
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))

enum {
  SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
  NO_BINARY_FOR_GPU = 209, INVALID_HANDLE = 400, NOT_FOUND = 500, LAUNCH_OUT_OF_RESOURCES = 701, NOT_SUPPORTED = 801
};

typedef int Result;
typedef int Device;
typedef uint64_t DevicePtr;
typedef struct Context Context;
typedef struct Module Module;
typedef struct Function Function;
typedef struct Stream Stream;
typedef struct Event Event;

typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
  Stream *stream;
  void *attributes;
  unsigned attribute_count;
} LaunchConfig;

Result cuInit(unsigned flags);
Result cuDeviceGetAttribute(int *value, int attribute, Device device);
Result cuDevicePrimaryCtxRetain(Context **context, Device device);
Result cuCtxSetCurrent(Context *context);
Result cuMemGetInfo_v2(size_t *free, size_t *total);
Result cuMemAlloc_v2(DevicePtr *pointer, size_t bytes);
Result cuMemFree_v2(DevicePtr pointer);
Result cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags);
Result cuMemFreeHost(void *pointer);
Result cuModuleLoadData(Module **module, const void *image);
Result cuModuleUnload(Module *module);
Result cuModuleGetFunction(Function **function, Module *module, const char *name);
Result cuLaunchKernel(const Function *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                      unsigned bz, unsigned shared, Stream *stream, void **parameters, void **extra);
Result cuStreamCreateWithPriority(Stream **stream, unsigned flags, int priority);
Result cuStreamDestroy_v2(Stream *stream);
Result cuEventCreate(Event **event, unsigned flags);
Result cuEventDestroy_v2(Event *event);
Result cuEventRecord(Event *event, Stream *stream);
Result cuEventElapsedTime_v2(float *milliseconds, Event *begin, Event *end);
Result cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status);
Result cuGetErrorString(Result error, const char **text);
int stand_in_memory_type(uint64_t pointer); /* 0: not CUDA's, 1: pinned host memory, 2: device memory */
int stand_in_stream_priority(const Stream *stream);
#endif
