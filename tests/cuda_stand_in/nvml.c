/* libnvidia-ml.so.1: the documented calls (docs.nvidia.com/deploy/nvml-api) that the project, its tests and torch use. */
#define _GNU_SOURCE
#include "card.h"
#include <stdio.h>
#include <string.h>

#define API __attribute__((visibility("default")))
enum { OK = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } MemoryV2;
typedef struct { unsigned long long total, free, used; } MemoryV1;
typedef struct { unsigned pid; unsigned long long bytes; } ProcessV1;
typedef struct { unsigned pid; unsigned long long bytes; unsigned instance, compute_instance; } ProcessV3;

static char device; /* its address is the handle */

static void uuid(char *text, unsigned room) {
  const unsigned char *u = card_uuid();
  char all[48] = "GPU-", *at = all + 4;
  for (int i = 0; i < 16; i++) at += sprintf(at, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", u[i]);
  snprintf(text, room, "%s", all);
}

API int nvmlInit_v2(void) { card(); return OK; }
API int nvmlInitWithFlags(unsigned flags) { (void)flags; return nvmlInit_v2(); }
API int nvmlShutdown(void) { return OK; }
API const char *nvmlErrorString(int error) { return error ? "not answered by the CUDA stand-in" : "success"; }
API int nvmlSystemGetDriverVersion(char *text, unsigned room) { snprintf(text, room, "stand-in"); return OK; }
API int nvmlSystemGetNVMLVersion(char *text, unsigned room) { return nvmlSystemGetDriverVersion(text, room); }
API int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = DRIVER_VERSION; return OK; }
API int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return OK; }
API int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = &device; return index ? INVALID_ARGUMENT : OK; }
API int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **handle) { (void)bus; *handle = &device; return OK; }
API int nvmlDeviceGetHandleByUUID(const char *wanted, void **handle) {
  char ours[48];
  uuid(ours, sizeof ours);
  *handle = &device;
  return strcmp(wanted, ours) ? NOT_FOUND : OK;
}

API int nvmlDeviceGetUUID(void *handle, char *text, unsigned room) { (void)handle; uuid(text, room); return OK; }
API int nvmlDeviceGetName(void *handle, char *text, unsigned room) {
  (void)handle;
  snprintf(text, room, "%s", card()->full_name);
  return OK;
}

API int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
  (void)handle;
  *major = card()->major, *minor = card()->minor;
  return OK;
}

API int nvmlDeviceGetMemoryInfo(void *handle, MemoryV1 *memory) {
  (void)handle;
  size_t used = card_used(0);
  *memory = (MemoryV1){card()->memory, card()->memory - used, used};
  return OK;
}

API int nvmlDeviceGetMemoryInfo_v2(void *handle, MemoryV2 *memory) {
  (void)handle;
  size_t used = card_used(0);
  *memory = (MemoryV2){memory->version, card()->memory, 0, card()->memory - used, used};
  return OK;
}

API int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, ProcessV3 *found) {
  (void)handle;
  pid_t pids[256];
  size_t bytes[256];
  unsigned room = found ? *count : 0, all = card_processes(256, pids, bytes);
  for (unsigned i = 0; i < all && i < room; i++) found[i] = (ProcessV3){pids[i], bytes[i], ~0u, ~0u};
  *count = all;
  return all > room ? INSUFFICIENT_SIZE : OK;
}

API int nvmlDeviceGetComputeRunningProcesses(void *handle, unsigned *count, ProcessV1 *found) {
  (void)handle;
  pid_t pids[256];
  size_t bytes[256];
  unsigned room = found ? *count : 0, all = card_processes(256, pids, bytes);
  for (unsigned i = 0; i < all && i < room; i++) found[i] = (ProcessV1){pids[i], bytes[i]};
  *count = all;
  return all > room ? INSUFFICIENT_SIZE : OK;
}

API int nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned *milliwatts) {
  (void)handle;
  *milliwatts = card()->watts * 1000;
  return OK;
}

API int nvmlDeviceGetPowerManagementLimit(void *handle, unsigned *milliwatts) { return nvmlDeviceGetEnforcedPowerLimit(handle, milliwatts); }
API int nvmlDeviceGetUtilizationRates(void *handle, unsigned rates[2]) { (void)handle; rates[0] = rates[1] = 0; return OK; }

/* What torch looks up together with the rest; one card has no neighbours. */
#define NOT_HERE(name) API int name(void) { return NOT_SUPPORTED; }
NOT_HERE(nvmlDeviceGetNvLinkRemoteDeviceType)
NOT_HERE(nvmlDeviceGetNvLinkRemotePciInfo_v2)
NOT_HERE(nvmlDeviceGetGpuFabricInfoV)
NOT_HERE(nvmlDeviceGetP2PStatus)
