/* A stand-in for NVIDIA's libnvidia-ml.so.1, so that pynvml, distributed and dask-cuda run unchanged on a machine
 * without a GPU. It exports what those three call, answers like a machine of the wanted shape, and is told that shape
 * by environment variables that it reads at every call:
 *
 *   STUB_NVML_GPUS    number of GPUs (default 1, at most 16)
 *   STUB_NVML_MEMORY  bytes of memory per GPU (default 16 GiB); "none": the GPUs have no memory of their own
 *   STUB_NVML_MIG     GPUs in MIG mode and their MIG devices: "0:2,3:0" is two on GPU 0 and none on GPU 3
 *   STUB_NVML_FAIL    calls that fail, and how: "init:9", "memory@1:3,name:15" (word, GPU, NVML error code)
 *
 * GPU i is GPU-<i + 1>-..., i + 1 MiB of its memory are used and it is 10 * (i + 1) percent busy. The MIG devices of a
 * GPU share its memory evenly and take its last MIG slots, so that the first slots are free (as they are on a real GPU
 * after a MIG device was destroyed). Like NVML, it answers "uninitialized" in a process that did not call nvmlInit,
 * also when that process is a fork of one that did.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6 };
enum { MAX_GPUS = 16, MIG_SLOTS = 7 };

typedef unsigned long long u64;
typedef struct { int gpu, mig; } Device; /* mig is a slot, or -1 for the GPU itself */
typedef struct { u64 total, free, used; } Memory;
typedef struct { unsigned version; u64 total, reserved, free, used; } Memory2;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } Pci;

static Device devices[MAX_GPUS][MIG_SLOTS + 1];
static pid_t owner;
static int users;

static int gpus(void) {
    const char *text = getenv("STUB_NVML_GPUS");
    int count = text ? atoi(text) : 1;
    return count > MAX_GPUS ? MAX_GPUS : count;
}

/* Number of MIG devices of a GPU, or -1 when it is not in MIG mode. */
static int migs(int gpu) {
    const char *text = getenv("STUB_NVML_MIG");
    for (int at, count, read; text && sscanf(text, "%d:%d%n", &at, &count, &read) == 2; text += read) {
        if (at == gpu) return count > MIG_SLOTS ? MIG_SLOTS : count;
        if (text[read] == ',') read++;
    }
    return -1;
}

static int has_slot(int gpu, int slot) { return migs(gpu) >= 0 && slot >= MIG_SLOTS - migs(gpu); }

/* Error code that a call is told to answer, or 0; gpu is -1 for calls that concern no GPU. */
static int told(const char *call, int gpu) {
    const char *text = getenv("STUB_NVML_FAIL");
    while (text && *text) {
        char word[32];
        int at = -1, code = 0, read = 0;
        if (sscanf(text, "%31[a-z]@%d:%d%n", word, &at, &code, &read) != 3 &&
            (at = -1, sscanf(text, "%31[a-z]:%d%n", word, &code, &read) != 2))
            return INVALID_ARGUMENT;
        if (!strcmp(word, call) && (at == -1 || at == gpu)) return code;
        text += read + (text[read] == ',');
    }
    return SUCCESS;
}

static int ready(const char *call, const Device *device) {
    if (!users || owner != getpid()) return UNINITIALIZED;
    return told(call, device ? device->gpu : -1);
}

#define READY(call, device) do { int code = ready(call, device); if (code) return code; } while (0)

static Device *handle(int gpu, int slot) {
    Device *device = &devices[gpu][slot + 1];
    device->gpu = gpu;
    device->mig = slot;
    return device;
}

static void write_uuid(const Device *device, char *text, unsigned size) {
    if (device->mig < 0)
        snprintf(text, size, "GPU-%08x-0000-0000-0000-%012x", device->gpu + 1, device->gpu + 1);
    else
        snprintf(text, size, "MIG-%04x%04x-0000-0000-0000-%012x", device->gpu + 1, device->mig + 1, device->gpu + 1);
}

/* 0 when the GPU has no memory of its own. */
static u64 memory_of(const Device *device) {
    const char *text = getenv("STUB_NVML_MEMORY");
    u64 total = text ? strtoull(text, NULL, 10) : 16ULL << 30;
    return device->mig < 0 ? total : total / migs(device->gpu);
}

static u64 used_of(const Device *device) { return (device->gpu + 1ULL) << 20; }

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    int code = told("init", -1);
    if (code) return code;
    users = owner == getpid() ? users + 1 : 1;
    owner = getpid();
    return SUCCESS;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) {
    if (!users || owner != getpid()) return UNINITIALIZED;
    users--;
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    static char text[40];
    snprintf(text, sizeof text, "Stub Error %d", code);
    return text;
}

int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    READY("driver", NULL);
    snprintf(text, size, "580.65.06");
    return SUCCESS;
}

int nvmlSystemGetNVMLVersion(char *text, unsigned size) {
    READY("driver", NULL);
    snprintf(text, size, "13.580.65.06");
    return SUCCESS;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    READY("driver", NULL);
    *version = 13000;
    return SUCCESS;
}

int nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

int nvmlDeviceGetCount_v2(unsigned *count) {
    READY("count", NULL);
    *count = gpus();
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
    READY("count", NULL);
    if (index >= (unsigned)gpus()) return INVALID_ARGUMENT;
    *device = handle(index, -1);
    return ready("handle", *device);
}

/* Only a whole UUID names a device here, as in NVML; CUDA_VISIBLE_DEVICES also takes the beginning of one. */
int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
    READY("count", NULL);
    for (int gpu = 0; gpu < gpus(); gpu++) {
        for (int slot = -1; slot < MIG_SLOTS; slot++) {
            char text[96];
            if (slot >= 0 && !has_slot(gpu, slot)) continue;
            write_uuid(handle(gpu, slot), text, sizeof text);
            if (strcmp(text, uuid)) continue;
            *device = handle(gpu, slot);
            return ready("handle", *device);
        }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetName(const Device *device, char *text, unsigned size) {
    READY("name", device);
    snprintf(text, size, device->mig < 0 ? "Stub GPU" : "Stub GPU MIG 1g.5gb");
    return SUCCESS;
}

int nvmlDeviceGetUUID(const Device *device, char *text, unsigned size) {
    READY("uuid", device);
    write_uuid(device, text, size);
    return SUCCESS;
}

int nvmlDeviceGetIndex(const Device *device, unsigned *index) {
    READY("index", device);
    *index = device->mig < 0 ? device->gpu : device->mig;
    return SUCCESS;
}

int nvmlDeviceGetMinorNumber(const Device *device, unsigned *minor) {
    READY("index", device);
    *minor = device->gpu;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(const Device *device, Memory *memory) {
    READY("memory", device);
    u64 total = memory_of(device);
    if (!total) return NOT_SUPPORTED;
    *memory = (Memory){total, total - used_of(device), used_of(device)};
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(const Device *device, Memory2 *memory) {
    READY("memory", device);
    u64 total = memory_of(device);
    if (!total) return NOT_SUPPORTED;
    *memory = (Memory2){memory->version, total, 0, total - used_of(device), used_of(device)};
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(const Device *device, Utilization *utilization) {
    READY("utilization", device);
    if (device->mig >= 0) return NOT_SUPPORTED;
    *utilization = (Utilization){(device->gpu + 1) * 10 % 101, 0};
    return SUCCESS;
}

int nvmlDeviceGetMigMode(const Device *device, unsigned *current, unsigned *pending) {
    READY("mig", device);
    if (!getenv("STUB_NVML_MIG") || device->mig >= 0) return NOT_SUPPORTED;
    *current = *pending = migs(device->gpu) >= 0;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(const Device *device, unsigned *count) {
    READY("mig", device);
    *count = getenv("STUB_NVML_MIG") ? MIG_SLOTS : 0;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(const Device *device, unsigned index, Device **mig) {
    READY("mig", device);
    if (index >= MIG_SLOTS) return INVALID_ARGUMENT;
    if (!has_slot(device->gpu, index)) return NOT_FOUND;
    *mig = handle(device->gpu, index);
    return SUCCESS;
}

int nvmlDeviceIsMigDeviceHandle(const Device *device, unsigned *mig) {
    READY("mig", device);
    *mig = device->mig >= 0;
    return SUCCESS;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(const Device *mig, Device **device) {
    READY("mig", mig);
    if (mig->mig < 0) return INVALID_ARGUMENT;
    *device = handle(mig->gpu, -1);
    return SUCCESS;
}

int nvmlDeviceGetCpuAffinity(const Device *device, unsigned size, unsigned long *mask) {
    READY("affinity", device);
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    const unsigned bits = 8 * sizeof *mask;
    memset(mask, 0, size * sizeof *mask);
    for (unsigned cpu = 0; cpu < cpus && cpu < size * bits; cpu++) mask[cpu / bits] |= 1UL << cpu % bits;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(const Device *device, unsigned *count, void *processes) {
    (void)processes;
    READY("processes", device);
    *count = 0;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v2(const Device *device, unsigned *count, void *processes) {
    return nvmlDeviceGetComputeRunningProcesses_v3(device, count, processes);
}

int nvmlDeviceGetPciInfo_v3(const Device *device, Pci *pci) {
    READY("pci", device);
    *pci = (Pci){.bus = device->gpu + 1, .id = 0x20b010de};
    snprintf(pci->legacy, sizeof pci->legacy, "0000:%02X:00.0", pci->bus);
    snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02X:00.0", pci->bus);
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(const Device *device, int *major, int *minor) {
    READY("capability", device);
    *major = 8;
    *minor = 0;
    return SUCCESS;
}
