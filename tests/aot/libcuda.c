/* A CUDA driver without a GPU: it takes whatever Triton's driver asks, checks what a real one would
   refuse of a launch or a tensor map on Hopper, and writes the names of launched kernels to the
   file that LAUNCHED names. Nothing runs. */

#include "cuda.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SHARED = 232448, PROCESSORS = 132 };

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = "refused by the stand-in of a driver";
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    return cuCtxGetCurrent(context);
}
CUresult cuDeviceGet(CUdevice *device, int index) { *device = 0; return CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute asked, CUdevice device) {
    switch (asked) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = SHARED + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = PROCESSORS; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
    }
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = (CUmodule)image;
    return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)strdup(name);
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute asked, CUfunction function) {
    *value = asked == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
    return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *config) {
    *n = 1;
    return CUDA_SUCCESS;
}

#undef cuPointerGetAttribute
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute asked, CUdeviceptr pointer) {
    *(CUdeviceptr *)value = pointer;
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **p, void **extra) {
    const char *path = getenv("LAUNCHED");
    FILE *log = path ? fopen(path, "a") : NULL;
    if (log != NULL) {
        fprintf(log, "%s\n", (const char *)function);
        fclose(log);
    }
    int fits = c->gridDimX && c->gridDimX <= INT32_MAX && c->gridDimY <= 65535 &&
               c->gridDimZ <= 65535 && c->blockDimX <= 1024 && c->sharedMemBytes <= SHARED;
    return fits ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *address, const cuuint64_t *sizes, const cuuint64_t *strides,
                                const cuuint32_t *box, const cuuint32_t *steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    static const int bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    static const cuuint32_t widest[] = {1u << 30, 32, 64, 128, 128, 128};
    cuuint32_t inner = box[0] * bytes[type];
    int fits = (uintptr_t)address % 16 == 0 && inner % 16 == 0 && inner <= widest[swizzle];
    for (cuuint32_t i = 0; i < rank; i++)
        fits = fits && sizes[i] && sizes[i] <= 1ull << 32 && box[i] && box[i] <= 256;
    for (cuuint32_t i = 0; i + 1 < rank; i++)
        fits = fits && strides[i] % 16 == 0 && strides[i] < 1ull << 40;
    return fits ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
