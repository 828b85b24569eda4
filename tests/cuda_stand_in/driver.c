/* libcuda.so.1 of a card that is not there: memory is counted, not held, and kernels are loaded, not run.
 *
 * What is written to device memory is forgotten, and what is read from it is zero. Everything is synchronous. */
#define _GNU_SOURCE
#include "driver.h"
#include "card.h"
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Device addresses: where no process of ours has memory, mapped to nothing, never reused. */
#define FIRST ((uint64_t)32 << 40)
#define END ((uint64_t)64 << 40)

struct Context { int unused; };
struct Stream { int priority; };
struct Event { struct timespec at; };
struct Module { char *image; size_t bytes; };
struct Function { size_t shared_limit; };

typedef struct Block { /* an allocation, a physical handle, a mapping, or pinned host memory */
  struct Block *next;
  uint64_t at;
  size_t bytes;
  int references;
  struct Block *handle;
} Block;

static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static Block *allocations, *mappings, *pinned, *handles;
static Context primary;
static __thread Context *current;
static uint64_t next_address = FIRST;
static int retained;

static size_t rounded(size_t bytes) { return (bytes + GRANULE - 1) / GRANULE * GRANULE; }

static uint64_t addresses(size_t bytes) {
  if (rounded(bytes) > END - next_address) return 0;
  uint64_t at = next_address;
  next_address += rounded(bytes);
  return at;
}

static Block *push(Block **list, uint64_t at, size_t bytes) {
  Block *block = calloc(1, sizeof *block);
  *block = (Block){.next = *list, .at = at, .bytes = bytes, .references = 1};
  return *list = block;
}

static Block *find(Block *list, uint64_t at) {
  while (list && !(list->at <= at && at < list->at + list->bytes)) list = list->next;
  return list;
}

static void drop(Block **list, Block *block) {
  while (*list != block) list = &(*list)->next;
  *list = block->next;
  free(block);
}

/* ---- the device */

API Result cuInit(unsigned flags) { (void)flags; card(); return SUCCESS; }
API Result cuDriverGetVersion(int *version) { *version = DRIVER_VERSION; return SUCCESS; }
API Result cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
API Result cuDeviceGet(Device *device, int index) { *device = index; return index ? INVALID_DEVICE : SUCCESS; }
API Result cuDeviceTotalMem_v2(size_t *bytes, Device device) { (void)device; *bytes = card()->memory; return SUCCESS; }
API Result cuDeviceGetUuid_v2(void *uuid, Device device) { (void)device; memcpy(uuid, card_uuid(), 16); return SUCCESS; }
API Result cuDeviceGetUuid(void *uuid, Device device) { return cuDeviceGetUuid_v2(uuid, device); }
API Result cuDeviceGetName(char *name, int room, Device device) {
  (void)device;
  snprintf(name, room, "%s", card()->full_name);
  return SUCCESS;
}

API Result cuDeviceGetPCIBusId(char *text, int room, Device device) {
  (void)device;
  snprintf(text, room, "0000:01:00.0");
  return SUCCESS;
}

API Result cuDeviceGetAttribute(int *value, int attribute, Device device) {
  const Card *c = card();
  if (device) return INVALID_DEVICE;
  switch (attribute) {
  case 1: case 2: case 3: *value = attribute == 3 ? 64 : 1024; break; /* threads of a block, and its x, y, z */
  case 4: *value = 64; break;
  case 5: *value = 2147483647; break;                                 /* blocks of a grid in x */
  case 6: case 7: *value = 65535; break;
  case 8: *value = 48 << 10; break;                                   /* shared memory of a block */
  case 9: *value = 64 << 10; break;                                   /* constant memory */
  case 10: *value = 32; break;                                        /* warp */
  case 11: *value = 2147483647; break;
  case 12: case 82: *value = 65536; break;                            /* registers */
  case 13: *value = 1500000; break;                                   /* clocks, kHz: of no card */
  case 36: *value = 5000000; break;
  case 14: *value = 512; break;
  case 51: *value = 32; break;
  case 16: *value = c->multiprocessors; break;
  case 33: *value = 1; break;                                         /* PCI bus */
  case 37: *value = c->bus_width; break;
  case 38: *value = (int)c->l2; break;
  case 39: *value = c->threads_per_multiprocessor; break;
  case 40: *value = 2; break;
  case 75: *value = c->major; break;
  case 76: *value = c->minor; break;
  case 81: *value = (int)c->shared_per_multiprocessor; break;
  case 97: *value = (int)c->shared_per_block_optin; break;
  case 106: *value = c->major == 8 && c->minor ? 16 : 32; break;      /* blocks of a multiprocessor */
  case 111: *value = c->major >= 8 ? 1024 : 0; break;                 /* reserved shared memory of a block */
  case 15: case 19: case 31: case 41: case 78: case 79: case 80: case 90: case 95: case 99: case 102:
    *value = 1; break; /* overlap, host mapping, concurrency, one address space, priorities, caches, virtual memory */
  case 120: case 127: case 129: *value = c->major >= 9; break;        /* clusters, tensor maps */
  default: *value = 0;
  }
  return SUCCESS;
}

API Result cuDeviceComputeCapability(int *major, int *minor, Device device) {
  (void)device;
  *major = card()->major, *minor = card()->minor;
  return SUCCESS;
}

/* ---- contexts: the primary one */

API Result cuDevicePrimaryCtxRetain(Context **context, Device device) {
  if (device) return INVALID_DEVICE;
  pthread_mutex_lock(&guard);
  int fits = retained || card_take(CONTEXT_BYTES);
  retained |= fits;
  pthread_mutex_unlock(&guard);
  *context = &primary;
  return fits ? SUCCESS : OUT_OF_MEMORY;
}

API Result cuDevicePrimaryCtxRelease_v2(Device device) { (void)device; return SUCCESS; }
API Result cuDevicePrimaryCtxGetState(Device device, unsigned *flags, int *active) {
  (void)device;
  *flags = 0, *active = retained;
  return SUCCESS;
}

API Result cuCtxGetCurrent(Context **context) { *context = current; return SUCCESS; }
API Result cuCtxSetCurrent(Context *context) { current = context; return SUCCESS; }
API Result cuCtxPushCurrent_v2(Context *context) { current = context; return SUCCESS; }
API Result cuCtxPopCurrent_v2(Context **context) { *context = current; return SUCCESS; }
API Result cuCtxGetDevice(Device *device) { *device = 0; return SUCCESS; }
API Result cuCtxSynchronize(void) { return SUCCESS; }
API Result cuCtxGetLimit(size_t *value, int limit) { (void)limit; *value = MIB; return SUCCESS; }
API Result cuCtxSetLimit(int limit, size_t value) { (void)limit, (void)value; return SUCCESS; }

/* ---- memory */

API Result cuMemGetInfo_v2(size_t *free, size_t *total) {
  *total = card()->memory;
  *free = *total - card_used(0);
  return SUCCESS;
}

API Result cuMemAlloc_v2(DevicePtr *pointer, size_t bytes) {
  if (!bytes) return INVALID_VALUE;
  if (!card_take(rounded(bytes))) return OUT_OF_MEMORY;
  pthread_mutex_lock(&guard);
  uint64_t at = addresses(bytes);
  if (at) push(&allocations, at, rounded(bytes));
  pthread_mutex_unlock(&guard);
  if (!at) card_give(rounded(bytes));
  *pointer = at;
  return at ? SUCCESS : OUT_OF_MEMORY;
}

API Result cuMemFree_v2(DevicePtr pointer) {
  pthread_mutex_lock(&guard);
  Block *block = find(allocations, pointer);
  size_t bytes = block && block->at == pointer ? block->bytes : 0;
  if (bytes) drop(&allocations, block);
  pthread_mutex_unlock(&guard);
  if (bytes) card_give(bytes);
  return bytes || !pointer ? SUCCESS : INVALID_VALUE;
}

API Result cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags) {
  (void)flags;
  if (posix_memalign(pointer, 4096, bytes ? bytes : 1)) return OUT_OF_MEMORY;
  pthread_mutex_lock(&guard);
  push(&pinned, (uint64_t)*pointer, bytes ? bytes : 1);
  pthread_mutex_unlock(&guard);
  return SUCCESS;
}

API Result cuMemFreeHost(void *pointer) {
  pthread_mutex_lock(&guard);
  Block *block = find(pinned, (uint64_t)pointer);
  if (block) drop(&pinned, block);
  pthread_mutex_unlock(&guard);
  free(pointer);
  return SUCCESS;
}

API int stand_in_memory_type(uint64_t pointer) {
  if (FIRST <= pointer && pointer < END) return 2;
  pthread_mutex_lock(&guard);
  int host = find(pinned, pointer) != NULL;
  pthread_mutex_unlock(&guard);
  return host;
}

API Result cuPointerGetAttribute(void *value, int attribute, DevicePtr pointer) {
  int type = stand_in_memory_type(pointer);
  if (!type) return INVALID_VALUE;
  switch (attribute) {
  case 1: *(Context **)value = &primary; break;
  case 2: *(unsigned *)value = type; break;
  case 3: case 4: *(uint64_t *)value = pointer; break;
  case 9: *(int *)value = 0; break;
  default: return NOT_SUPPORTED;
  }
  return SUCCESS;
}

API Result cuMemGetAddressRange_v2(DevicePtr *start, size_t *bytes, DevicePtr pointer) {
  pthread_mutex_lock(&guard);
  Block *block = find(allocations, pointer);
  if (!block) block = find(mappings, pointer);
  if (block && start) *start = block->at;
  if (block && bytes) *bytes = block->bytes;
  pthread_mutex_unlock(&guard);
  return block ? SUCCESS : NOT_FOUND;
}

/* Copies: the host's side of them. */
API Result cuMemcpyDtoH_v2(void *to, DevicePtr from, size_t bytes) { (void)from; memset(to, 0, bytes); return SUCCESS; }
API Result cuMemcpyHtoD_v2(DevicePtr to, const void *from, size_t bytes) { (void)to, (void)from, (void)bytes; return SUCCESS; }
API Result cuMemsetD32Async(DevicePtr at, unsigned value, size_t count, Stream *stream) {
  (void)at, (void)value, (void)count, (void)stream;
  return SUCCESS;
}

/* Virtual memory: a handle counts while it is referenced or mapped. */
API Result cuMemGetAllocationGranularity(size_t *bytes, const void *properties, int option) {
  (void)properties, (void)option;
  *bytes = GRANULE;
  return SUCCESS;
}

API Result cuMemAddressReserve(DevicePtr *pointer, size_t bytes, size_t alignment, DevicePtr wanted, uint64_t flags) {
  (void)alignment, (void)wanted, (void)flags;
  pthread_mutex_lock(&guard);
  *pointer = addresses(bytes);
  pthread_mutex_unlock(&guard);
  return *pointer ? SUCCESS : OUT_OF_MEMORY;
}

API Result cuMemAddressFree(DevicePtr pointer, size_t bytes) { (void)pointer, (void)bytes; return SUCCESS; }

API Result cuMemCreate(uint64_t *handle, size_t bytes, const void *properties, uint64_t flags) {
  (void)properties, (void)flags;
  if (bytes % GRANULE) return INVALID_VALUE;
  if (!card_take(bytes)) return OUT_OF_MEMORY;
  pthread_mutex_lock(&guard);
  *handle = (uint64_t)push(&handles, 0, bytes);
  pthread_mutex_unlock(&guard);
  return SUCCESS;
}

static void release(Block *handle) {
  if (--handle->references) return;
  card_give(handle->bytes);
  drop(&handles, handle);
}

API Result cuMemRelease(uint64_t handle) {
  pthread_mutex_lock(&guard);
  release((Block *)handle);
  pthread_mutex_unlock(&guard);
  return SUCCESS;
}

API Result cuMemMap(DevicePtr pointer, size_t bytes, size_t offset, uint64_t handle, uint64_t flags) {
  (void)offset, (void)flags;
  pthread_mutex_lock(&guard);
  Block *mapping = push(&mappings, pointer, bytes);
  mapping->handle = (Block *)handle;
  mapping->handle->references++;
  pthread_mutex_unlock(&guard);
  return SUCCESS;
}

API Result cuMemUnmap(DevicePtr pointer, size_t bytes) {
  pthread_mutex_lock(&guard);
  for (Block *mapping, *next = mappings; (mapping = next);) {
    next = mapping->next;
    if (pointer <= mapping->at && mapping->at < pointer + bytes) {
      release(mapping->handle);
      drop(&mappings, mapping);
    }
  }
  pthread_mutex_unlock(&guard);
  return SUCCESS;
}

API Result cuMemSetAccess(DevicePtr pointer, size_t bytes, const void *access, size_t count) {
  (void)pointer, (void)bytes, (void)access, (void)count;
  return SUCCESS;
}

/* ---- modules and kernels */

typedef struct { /* of a 64-bit ELF file */
  unsigned char ident[16];
  uint16_t type, machine;
  uint32_t version;
  uint64_t entry, program_offset, section_offset;
  uint32_t flags;
  uint16_t header_size, program_size, program_count, section_size, section_count, names;
} ElfHeader;

/* Machine code only: what is compiled must have been compiled to the end. */
API Result cuModuleLoadData(Module **module, const void *image) {
  const ElfHeader *elf = image;
  if (memcmp(elf->ident, "\177ELF", 4) || elf->machine != 190) return INVALID_IMAGE; /* EM_CUDA */
  int ours = card()->major * 10 + card()->minor;
  /* The architecture is in the second byte of the flags (ABI version 8), before that in the first. */
  int sm = elf->ident[8] >= 8 ? (elf->flags >> 8) & 0xff : elf->flags & 0xff;
  if (sm / 10 != ours / 10 || sm > ours) return NO_BINARY_FOR_GPU;
  size_t bytes = elf->section_offset + (size_t)elf->section_size * elf->section_count;
  *module = calloc(1, sizeof **module);
  **module = (Module){.image = malloc(bytes), .bytes = bytes};
  memcpy((*module)->image, image, bytes);
  return SUCCESS;
}

API Result cuModuleLoadDataEx(Module **module, const void *image, unsigned count, int *options, void **values) {
  (void)count, (void)options, (void)values;
  return cuModuleLoadData(module, image);
}

API Result cuModuleLoad(Module **module, const char *path) { /* Inductor's static launcher loads cubins from files */
  FILE *file = fopen(path, "rb");
  if (!file) return NOT_FOUND;
  fseek(file, 0, SEEK_END);
  size_t bytes = ftell(file);
  rewind(file);
  char *image = malloc(bytes + sizeof(ElfHeader));
  size_t got = fread(image, 1, bytes, file);
  fclose(file);
  Result result = got == bytes && bytes >= sizeof(ElfHeader) ? cuModuleLoadData(module, image) : INVALID_IMAGE;
  free(image);
  return result;
}

API Result cuModuleUnload(Module *module) {
  free(module->image);
  free(module);
  return SUCCESS;
}

API Result cuModuleGetFunction(Function **function, Module *module, const char *name) {
  char section[512];
  int length = snprintf(section, sizeof section, ".text.%s", name);
  if (!memmem(module->image, module->bytes, section, length + 1)) return NOT_FOUND;
  *function = calloc(1, sizeof **function);
  (*function)->shared_limit = 48 << 10;
  return SUCCESS;
}

API Result cuFuncGetAttribute(int *value, int attribute, const Function *function) {
  switch (attribute) {
  case 0: *value = 1024; break; /* threads of a block */
  case 4: *value = 32; break;   /* registers: of no kernel */
  case 5: case 6: *value = card()->major * 10 + card()->minor; break;
  case 8: *value = (int)function->shared_limit; break;
  default: *value = 0;
  }
  return SUCCESS;
}

API Result cuFuncSetAttribute(Function *function, int attribute, int value) {
  if (attribute == 8) {
    if (value < 0 || (size_t)value > card()->shared_per_block_optin) return INVALID_VALUE;
    function->shared_limit = value;
  }
  return attribute <= 16 ? SUCCESS : NOT_SUPPORTED;
}

API Result cuFuncSetCacheConfig(Function *function, int config) { (void)function, (void)config; return SUCCESS; }

API Result cuLaunchKernel(const Function *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                          unsigned bz, unsigned shared, Stream *stream, void **parameters, void **extra) {
  (void)stream, (void)parameters, (void)extra;
  if (!gx || !gy || !gz || !bx || !by || !bz || gy > 65535 || gz > 65535) return INVALID_VALUE;
  if ((size_t)bx * by * bz > 1024 || shared > function->shared_limit) return LAUNCH_OUT_OF_RESOURCES;
  return SUCCESS;
}

API Result cuLaunchKernelEx(const LaunchConfig *c, const Function *function, void **parameters, void **extra) {
  return cuLaunchKernel(function, c->grid_x, c->grid_y, c->grid_z, c->block_x, c->block_y, c->block_z, c->shared,
                        c->stream, parameters, extra);
}

API Result cuLaunchCooperativeKernel(const Function *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                     unsigned by, unsigned bz, unsigned shared, Stream *stream, void **parameters) {
  return cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, parameters, NULL);
}

API Result cuLaunchHostFunc(Stream *stream, void (*work)(void *), void *data) {
  (void)stream;
  work(data);
  return SUCCESS;
}

API Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const Function *function, int threads, size_t shared) {
  (void)function, (void)shared;
  *blocks = threads > 0 ? card()->threads_per_multiprocessor / threads : 1;
  return SUCCESS;
}

API Result cuOccupancyMaxActiveClusters(int *clusters, const Function *function, const LaunchConfig *config) {
  (void)function, (void)config;
  *clusters = card()->multiprocessors / 2;
  return SUCCESS;
}

/* An opaque descriptor of 128 bytes that only kernels read. */
API Result cuTensorMapEncodeTiled(void *map) { memset(map, 0, 128); return card()->major >= 9 ? SUCCESS : NOT_SUPPORTED; }
API Result cuTensorMapEncodeIm2col(void *map) { return cuTensorMapEncodeTiled(map); }

/* What torch looks up by name, or links to, and no test needs. */
#define NOT_HERE(name) API Result name(void) { return NOT_SUPPORTED; }
NOT_HERE(cuMemExportToShareableHandle)
NOT_HERE(cuMemImportFromShareableHandle)
NOT_HERE(cuMemRetainAllocationHandle)
NOT_HERE(cuMemGetAllocationPropertiesFromHandle)
NOT_HERE(cuStreamWriteValue32_v2)
NOT_HERE(cuLinkCreate_v2)
NOT_HERE(cuLinkAddData_v2)
NOT_HERE(cuLinkComplete)
NOT_HERE(cuLinkDestroy)

/* ---- streams and events */

API Result cuStreamCreateWithPriority(Stream **stream, unsigned flags, int priority) {
  (void)flags;
  *stream = calloc(1, sizeof **stream);
  (*stream)->priority = priority;
  return SUCCESS;
}

API Result cuStreamCreate(Stream **stream, unsigned flags) { return cuStreamCreateWithPriority(stream, flags, 0); }
API Result cuStreamDestroy_v2(Stream *stream) { free(stream); return SUCCESS; }
API Result cuStreamSynchronize(Stream *stream) { (void)stream; return SUCCESS; }
API Result cuStreamIsCapturing(Stream *stream, int *status) { (void)stream; *status = 0; return SUCCESS; }
API int stand_in_stream_priority(const Stream *stream) { return (uintptr_t)stream > 2 ? stream->priority : 0; }

API Result cuEventCreate(Event **event, unsigned flags) { (void)flags; *event = calloc(1, sizeof **event); return SUCCESS; }
API Result cuEventDestroy_v2(Event *event) { free(event); return SUCCESS; }
API Result cuEventRecord(Event *event, Stream *stream) {
  (void)stream;
  clock_gettime(CLOCK_MONOTONIC, &event->at);
  return SUCCESS;
}

API Result cuEventElapsedTime_v2(float *milliseconds, Event *begin, Event *end) {
  *milliseconds = (end->at.tv_sec - begin->at.tv_sec) * 1e3 + (end->at.tv_nsec - begin->at.tv_nsec) / 1e6;
  return SUCCESS;
}

/* ---- errors and names */

API Result cuGetErrorString(Result error, const char **text) {
  static const struct { Result error; const char *text; } TEXTS[] = {
      {SUCCESS, "no error"}, {INVALID_VALUE, "invalid argument"}, {OUT_OF_MEMORY, "out of memory"},
      {INVALID_DEVICE, "invalid device ordinal"}, {INVALID_IMAGE, "device kernel image is invalid"},
      {NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"},
      {INVALID_HANDLE, "invalid resource handle"}, {NOT_FOUND, "named symbol not found"},
      {LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"},
      {NOT_SUPPORTED, "operation not supported by the CUDA stand-in"},
  };
  for (size_t i = 0; i < sizeof TEXTS / sizeof *TEXTS; i++)
    if (TEXTS[i].error == error) return *text = TEXTS[i].text, SUCCESS;
  *text = "unrecognized error code";
  return INVALID_VALUE;
}

API Result cuGetErrorName(Result error, const char **text) { return cuGetErrorString(error, text); }

API Result cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
  (void)version, (void)flags;
  static void *self;
  if (!self) self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  char newest[128];
  snprintf(newest, sizeof newest, "%s_v2", name);
  *function = self ? dlsym(self, newest) : NULL;
  if (!*function && self) *function = dlsym(self, name);
  if (status) *status = *function ? 0 : 1; /* found, or no such symbol */
  return *function ? SUCCESS : NOT_FOUND;
}

/* Tables without documentation, which NVIDIA's own libraries ask for: none. */
API Result cuGetExportTable(const void **table, const void *id) { (void)id; *table = NULL; return NOT_FOUND; }
