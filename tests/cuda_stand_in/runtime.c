/* libcudart.so.13: CUDA's documented runtime interface (docs.nvidia.com/cuda/cuda-runtime-api) over driver.c. */
#define _GNU_SOURCE
#include "card.h"
#include "driver.h"
#include <stdlib.h>
#include <string.h>

typedef Result Error; /* the runtime's codes are the driver's, as far as the stand-in uses them */
typedef struct { unsigned x, y, z; } Dim3;

enum { INVALID_RUNTIME_DEVICE = 101 };

typedef struct { /* cudaDeviceProp of CUDA 13 */
  char name[256];
  unsigned char uuid[16];
  char luid[8];
  unsigned luid_mask;
  size_t total_memory, shared_per_block;
  int registers_per_block, warp;
  size_t pitch;
  int threads_per_block, threads_dim[3], grid[3];
  size_t constant_memory;
  int major, minor;
  size_t texture_alignment, texture_pitch_alignment;
  int multiprocessors, integrated, map_host, textures[39];
  size_t surface_alignment;
  int concurrent_kernels, ecc, pci_bus, pci_device, pci_domain, tcc, async_engines, unified_addressing, bus_width, l2,
      persisting_l2, threads_per_multiprocessor, stream_priorities, global_l1, local_l1;
  size_t shared_per_multiprocessor;
  int registers_per_multiprocessor, managed, multi_board, board_group, native_atomics, pageable, concurrent_managed,
      preemption, registered_pointers, cooperative;
  size_t shared_per_block_optin;
  int host_page_tables, direct_managed, blocks_per_multiprocessor, access_window;
  size_t reserved_shared_per_block;
  int rest[20];
  int reserved[56];
} Properties;

typedef struct {
  size_t shared, constant, local;
  int threads_per_block, registers, ptx, binary, cache, dynamic_shared, carveout, cluster[6], reserved[16];
} FunctionAttributes;

typedef struct {
  int type, device;
  void *device_pointer, *host_pointer;
  long reserved[8];
} PointerAttributes;

typedef struct {
  Dim3 grid, block;
  size_t shared;
  Stream *stream;
  void *attributes;
  unsigned attribute_count;
} RuntimeLaunchConfig;

static __thread Error last;
static __thread struct { Dim3 grid, block; size_t shared; Stream *stream; } pushed[8];
static __thread int depth;

static Error keep(Error error) { return error ? last = error : SUCCESS; }

/* The runtime makes the primary context at the first call that needs one. */
static Error ready(void) {
  static __thread int done;
  Context *context;
  if (done) return SUCCESS;
  Error error = cuDevicePrimaryCtxRetain(&context, 0);
  if (!error) done = 1, cuCtxSetCurrent(context);
  return keep(error);
}

/* ---- the device */

API Error cudaGetDeviceCount(int *count) { *count = 1; return cuInit(0); }
API Error cudaGetDevice(int *device) { *device = 0; return SUCCESS; }
API Error cudaSetDevice(int device) { return device ? keep(INVALID_RUNTIME_DEVICE) : ready(); }
API Error cudaDeviceSynchronize(void) { return ready(); }
API Error cudaDriverGetVersion(int *version) { *version = DRIVER_VERSION; return SUCCESS; }
API Error cudaRuntimeGetVersion(int *version) { *version = DRIVER_VERSION; return SUCCESS; }
API Error cudaDeviceGetAttribute(int *value, int attribute, int device) { return keep(cuDeviceGetAttribute(value, attribute, device)); }
API Error cudaDeviceCanAccessPeer(int *can, int device, int peer) { (void)device, (void)peer; *can = 0; return SUCCESS; }
API Error cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0, *greatest = -5; return SUCCESS; }
API Error cudaDeviceGetPCIBusId(char *text, int room, int device) {
  (void)device;
  strncpy(text, "0000:01:00.0", room);
  return SUCCESS;
}

static int attribute(int number) {
  int value;
  cuDeviceGetAttribute(&value, number, 0);
  return value;
}

API Error cudaGetDeviceProperties(Properties *p, int device) {
  if (device) return keep(INVALID_RUNTIME_DEVICE);
  const Card *c = card();
  memset(p, 0, sizeof *p);
  strncpy(p->name, c->full_name, sizeof p->name - 1);
  memcpy(p->uuid, card_uuid(), 16);
  p->total_memory = c->memory, p->major = c->major, p->minor = c->minor, p->multiprocessors = c->multiprocessors;
  p->shared_per_block = attribute(8), p->registers_per_block = attribute(12), p->warp = attribute(10);
  p->pitch = attribute(11), p->threads_per_block = 1024, p->constant_memory = attribute(9);
  for (int i = 0; i < 3; i++) p->threads_dim[i] = attribute(2 + i), p->grid[i] = attribute(5 + i);
  p->texture_alignment = attribute(14), p->texture_pitch_alignment = attribute(51), p->map_host = 1;
  p->concurrent_kernels = 1, p->pci_bus = 1, p->async_engines = 2, p->unified_addressing = 1;
  p->bus_width = c->bus_width, p->l2 = (int)c->l2, p->threads_per_multiprocessor = c->threads_per_multiprocessor;
  p->stream_priorities = p->global_l1 = p->local_l1 = p->preemption = p->cooperative = 1;
  p->shared_per_multiprocessor = c->shared_per_multiprocessor, p->registers_per_multiprocessor = attribute(82);
  p->shared_per_block_optin = c->shared_per_block_optin, p->blocks_per_multiprocessor = attribute(106);
  p->reserved_shared_per_block = attribute(111);
  return SUCCESS;
}

/* ---- memory */

API Error cudaMemGetInfo(size_t *free, size_t *total) { return ready() ? last : keep(cuMemGetInfo_v2(free, total)); }
API Error cudaMalloc(void **pointer, size_t bytes) {
  if (ready()) return last;
  *pointer = NULL;
  return bytes ? keep(cuMemAlloc_v2((DevicePtr *)pointer, bytes)) : SUCCESS;
}

API Error cudaFree(void *pointer) { return ready() ? last : keep(cuMemFree_v2((DevicePtr)pointer)); }
API Error cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) { return ready() ? last : keep(cuMemHostAlloc(pointer, bytes, flags)); }
API Error cudaFreeHost(void *pointer) { return keep(cuMemFreeHost(pointer)); }
API Error cudaHostRegister(void *pointer, size_t bytes, unsigned flags) { (void)pointer, (void)bytes, (void)flags; return SUCCESS; }
API Error cudaHostUnregister(void *pointer) { (void)pointer; return SUCCESS; }

API Error cudaPointerGetAttributes(PointerAttributes *found, const void *pointer) {
  int type = stand_in_memory_type((uint64_t)pointer);
  void *p = (void *)pointer;
  *found = (PointerAttributes){.type = type, .device = type ? 0 : -1, .device_pointer = type ? p : NULL,
                               .host_pointer = type == 2 ? NULL : p};
  return SUCCESS;
}

/* Device memory holds nothing: what comes from it is zero. */
API Error cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, Stream *stream) {
  (void)kind, (void)stream;
  if (ready()) return last;
  if (stand_in_memory_type((uint64_t)to) == 2) return SUCCESS;
  if (stand_in_memory_type((uint64_t)from) == 2) memset(to, 0, bytes);
  else memcpy(to, from, bytes);
  return SUCCESS;
}

API Error cudaMemcpy(void *to, const void *from, size_t bytes, int kind) { return cudaMemcpyAsync(to, from, bytes, kind, NULL); }
API Error cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, int kind, Stream *stream) {
  Error error = SUCCESS;
  for (size_t row = 0; row < height && !error; row++)
    error = cudaMemcpyAsync((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, kind, stream);
  return error;
}

API Error cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes, Stream *stream) {
  (void)to_device, (void)from_device;
  return cudaMemcpyAsync(to, from, bytes, 4, stream);
}

API Error cudaMemcpyToSymbol(const void *symbol, const void *from, size_t bytes, size_t offset, int kind) {
  (void)symbol, (void)from, (void)bytes, (void)offset, (void)kind;
  return ready();
}

API Error cudaMemset(void *at, int value, size_t bytes) { (void)at, (void)value, (void)bytes; return ready(); }
API Error cudaMemsetAsync(void *at, int value, size_t bytes, Stream *stream) { (void)stream; return cudaMemset(at, value, bytes); }
API Error cudaGetSymbolAddress(void **pointer, const void *symbol) {
  static DevicePtr somewhere;
  (void)symbol;
  if (ready()) return last;
  if (!somewhere) keep(cuMemAlloc_v2(&somewhere, GRANULE));
  *pointer = (void *)somewhere;
  return SUCCESS;
}

/* ---- streams, events */

API Error cudaStreamCreateWithPriority(Stream **stream, unsigned flags, int priority) { return ready() ? last : keep(cuStreamCreateWithPriority(stream, flags, priority)); }
API Error cudaStreamCreateWithFlags(Stream **stream, unsigned flags) { return cudaStreamCreateWithPriority(stream, flags, 0); }
API Error cudaStreamCreate(Stream **stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
API Error cudaStreamDestroy(Stream *stream) { return cuStreamDestroy_v2(stream); }
API Error cudaStreamSynchronize(Stream *stream) { (void)stream; return SUCCESS; }
API Error cudaStreamQuery(Stream *stream) { (void)stream; return SUCCESS; }
API Error cudaStreamWaitEvent(Stream *stream, Event *event, unsigned flags) { (void)stream, (void)event, (void)flags; return SUCCESS; }
API Error cudaStreamGetPriority(Stream *stream, int *priority) { *priority = stand_in_stream_priority(stream); return SUCCESS; }
API Error cudaStreamIsCapturing(Stream *stream, int *status) { (void)stream; *status = 0; return SUCCESS; }
API Error cudaStreamGetCaptureInfo(Stream *stream, int *status, uint64_t *id, void *graph, void *dependencies, void *edges, size_t *count) {
  (void)stream, (void)graph, (void)dependencies, (void)edges;
  *status = 0;
  if (id) *id = 0;
  if (count) *count = 0;
  return SUCCESS;
}

API Error cudaThreadExchangeStreamCaptureMode(int *mode) { (void)mode; return SUCCESS; }
API Error cudaLaunchHostFunc(Stream *stream, void (*work)(void *), void *data) { (void)stream; work(data); return SUCCESS; }
API Error cudaStreamAddCallback(Stream *stream, void (*work)(Stream *, Error, void *), void *data, unsigned flags) {
  (void)flags;
  work(stream, SUCCESS, data);
  return SUCCESS;
}

API Error cudaEventCreateWithFlags(Event **event, unsigned flags) { return ready() ? last : keep(cuEventCreate(event, flags)); }
API Error cudaEventCreate(Event **event) { return cudaEventCreateWithFlags(event, 0); }
API Error cudaEventDestroy(Event *event) { return cuEventDestroy_v2(event); }
API Error cudaEventQuery(Event *event) { (void)event; return SUCCESS; }
API Error cudaEventSynchronize(Event *event) { (void)event; return SUCCESS; }
API Error cudaEventRecord(Event *event, Stream *stream) { return cuEventRecord(event, stream); }
API Error cudaEventRecordWithFlags(Event *event, Stream *stream, unsigned flags) { (void)flags; return cuEventRecord(event, stream); }
API Error cudaEventElapsedTime(float *milliseconds, Event *begin, Event *end) { return cuEventElapsedTime_v2(milliseconds, begin, end); }

/* ---- kernels that libraries bring along: known by their host function, launched into nothing */

API void **__cudaRegisterFatBinary(void *fat) { return malloc(sizeof fat); }
API void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
API void __cudaUnregisterFatBinary(void **handle) { free(handle); }
API char __cudaInitModule(void **handle) { (void)handle; return 1; }
API void __cudaRegisterFunction(void) {}
API void __cudaRegisterVar(void) {}
API Error __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return SUCCESS; }
API unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, Stream *stream) {
  if (depth == 8) return 1;
  pushed[depth].grid = grid, pushed[depth].block = block, pushed[depth].shared = shared;
  pushed[depth++].stream = stream;
  return 0;
}

API Error __cudaPopCallConfiguration(Dim3 *grid, Dim3 *block, size_t *shared, Stream **stream) {
  if (!depth) return INVALID_VALUE;
  depth--;
  *grid = pushed[depth].grid, *block = pushed[depth].block, *shared = pushed[depth].shared;
  *stream = pushed[depth].stream;
  return SUCCESS;
}

API Error cudaLaunchKernel(const void *function, Dim3 grid, Dim3 block, void **arguments, size_t shared, Stream *stream) {
  (void)function, (void)arguments, (void)stream;
  if (ready()) return last;
  size_t threads = (size_t)block.x * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || !threads || grid.y > 65535 || grid.z > 65535) return keep(9); /* configuration */
  return keep(threads > 1024 || shared > card()->shared_per_block_optin ? LAUNCH_OUT_OF_RESOURCES : SUCCESS);
}

API Error __cudaLaunchKernel(void *kernel, Dim3 grid, Dim3 block, void **arguments, size_t shared, Stream *stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

API Error cudaLaunchCooperativeKernel(const void *function, Dim3 grid, Dim3 block, void **arguments, size_t shared, Stream *stream) {
  return cudaLaunchKernel(function, grid, block, arguments, shared, stream);
}

API Error cudaLaunchKernelExC(const RuntimeLaunchConfig *c, const void *function, void **arguments) {
  return cudaLaunchKernel(function, c->grid, c->block, arguments, c->shared, c->stream);
}

API Error cudaFuncGetAttributes(FunctionAttributes *found, const void *function) {
  (void)function;
  /* What torch's builds have machine code for: the newest that the card runs. CUB asks, to choose how it sorts. */
  static const int BUILT[] = {75, 80, 86, 90, 100, 120};
  int architecture = BUILT[0];
  for (size_t i = 0; i < sizeof BUILT / sizeof *BUILT; i++)
    if (BUILT[i] <= card()->major * 10 + card()->minor) architecture = BUILT[i];
  *found = (FunctionAttributes){.threads_per_block = 1024, .registers = 32, .ptx = architecture, .binary = architecture,
                                .dynamic_shared = 48 << 10};
  return ready();
}

API Error cudaFuncSetAttribute(const void *function, int attribute, int value) {
  (void)function;
  return keep(attribute == 8 && (size_t)value > card()->shared_per_block_optin ? INVALID_VALUE : SUCCESS);
}

API Error cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads, size_t shared, unsigned flags) {
  (void)function, (void)shared, (void)flags;
  *blocks = threads > 0 ? card()->threads_per_multiprocessor / threads : 1;
  return SUCCESS;
}

API Error cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

/* ---- errors, names */

API Error cudaGetLastError(void) {
  Error error = last;
  last = SUCCESS;
  return error;
}

API Error cudaPeekAtLastError(void) { return last; }
API const char *cudaGetErrorString(Error error) {
  const char *text;
  cuGetErrorString(error, &text);
  return text;
}

API const char *cudaGetErrorName(Error error) { return cudaGetErrorString(error); }
API Error cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, uint64_t flags, int *status) {
  cuGetProcAddress_v2(name, function, version, flags, status);
  return SUCCESS;
}

API Error cudaProfilerStart(void) { return SUCCESS; }
API Error cudaProfilerStop(void) { return SUCCESS; }

/* What torch links to and no test needs: CUDA graphs, memory pools, other devices and processes. */
#define NOT_HERE(name) API Error name(void) { return keep(NOT_SUPPORTED); }
NOT_HERE(cudaDeviceEnablePeerAccess)
NOT_HERE(cudaDeviceGetDefaultMemPool)
NOT_HERE(cudaDeviceGetGraphMemAttribute)
NOT_HERE(cudaDeviceSetGraphMemAttribute)
NOT_HERE(cudaFreeAsync)
NOT_HERE(cudaGraphAddNode)
NOT_HERE(cudaGraphConditionalHandleCreate)
NOT_HERE(cudaGraphDestroy)
NOT_HERE(cudaGraphExecDestroy)
NOT_HERE(cudaGraphGetNodes)
NOT_HERE(cudaGraphInstantiateWithFlags)
NOT_HERE(cudaGraphLaunch)
NOT_HERE(cudaGraphNodeGetDependencies)
NOT_HERE(cudaGraphRetainUserObject)
NOT_HERE(cudaIpcCloseMemHandle)
NOT_HERE(cudaIpcGetEventHandle)
NOT_HERE(cudaIpcGetMemHandle)
NOT_HERE(cudaIpcOpenEventHandle)
NOT_HERE(cudaIpcOpenMemHandle)
NOT_HERE(cudaKernelSetAttributeForDevice)
NOT_HERE(cudaLibraryGetKernel)
NOT_HERE(cudaLibraryLoadData)
NOT_HERE(cudaLibraryUnload)
NOT_HERE(cudaMallocAsync)
NOT_HERE(cudaMemPoolGetAttribute)
NOT_HERE(cudaMemPoolSetAccess)
NOT_HERE(cudaMemPoolSetAttribute)
NOT_HERE(cudaMemPoolTrimTo)
NOT_HERE(cudaStreamBeginCapture)
NOT_HERE(cudaStreamBeginCaptureToGraph)
NOT_HERE(cudaStreamEndCapture)
NOT_HERE(cudaStreamUpdateCaptureDependencies)
NOT_HERE(cudaUserObjectCreate)
NOT_HERE(cudaUserObjectRelease)
