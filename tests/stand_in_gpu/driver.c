/* A GPU that computes nothing: libcudart's and libcuda's functions that torch and triton call.

   Memory of the device is main memory, a copy copies, a launch does nothing. Everything that runs
   on the host is real: streams and events, pinned memory, autograd's engine, and compilation for
   the compute capability that STAND_IN_CAPABILITY names (80 for 8.0). cuBLAS and cuDNN stay
   closed: they bring a CUDA runtime of their own. */

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

static char token; /* What every handle points to. */

static int capability(void) {
    const char *text = getenv("STAND_IN_CAPABILITY");
    return text ? atoi(text) : 80;
}

/* Shared memory that a block may ask for, in bytes.
   Source: CUDA programming guide, technical specifications per compute capability. */
static int shared_memory(void) {
    int major = capability() / 10, minor = capability() % 10;
    return 1024 * (major >= 9 ? 227 : major == 8 ? (minor == 0 || minor == 7 ? 163 : 99) : 64);
}

static int threads_per_processor(void) {
    return capability() >= 80 ? 2048 : 1024;
}

/* What the device is. The runtime's and the driver's attributes have the same numbers. */

static int attribute(int number) {
    switch (number) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return capability() / 10;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return capability() % 10;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 100;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return threads_per_processor();
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: return 65536;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 48 * 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return shared_memory();
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return shared_memory() + 1024;
    default: return 0;
    }
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr number, int device) {
    *value = attribute(number);
    return 0;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute number, CUdevice device) {
    *value = attribute(number);
    return 0;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, "stand-in");
    properties->major = capability() / 10;
    properties->minor = capability() % 10;
    properties->totalGlobalMem = (size_t)80 << 30;
    properties->multiProcessorCount = 100;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = threads_per_processor();
    properties->maxBlocksPerMultiProcessor = 16;
    properties->maxGridSize[0] = 2147483647;
    properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
    properties->maxThreadsDim[2] = 64;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
    properties->sharedMemPerBlock = 48 * 1024;
    properties->sharedMemPerBlockOptin = shared_memory();
    properties->sharedMemPerMultiprocessor = shared_memory() + 1024;
    properties->l2CacheSize = 40 << 20;
    return 0;
}

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return 0; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return 0; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return 0; }
CUresult cuDeviceGet(CUdevice *device, int number) { *device = 0; return 0; }
CUresult cuDriverGetVersion(int *version) { *version = CUDART_VERSION; return 0; }

/* Memory. */

static struct { char *begin, *end; } pinned[4096];
static int num_pinned;

cudaError_t cudaMalloc(void **memory, size_t size) {
    *memory = aligned_alloc(512, (size + 511) / 512 * 512);
    return *memory ? 0 : cudaErrorMemoryAllocation;
}

cudaError_t cudaFree(void *memory) { free(memory); return 0; }

cudaError_t cudaHostAlloc(void **memory, size_t size, unsigned flags) {
    if (num_pinned == sizeof pinned / sizeof *pinned || cudaMalloc(memory, size))
        return cudaErrorMemoryAllocation;
    pinned[num_pinned].begin = *memory;
    pinned[num_pinned++].end = (char *)*memory + size;
    return 0;
}

/* Pinned memory is never given back, so that its addresses stay its own. */
cudaError_t cudaFreeHost(void *memory) { return 0; }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *memory) {
    memset(attributes, 0, sizeof *attributes);
    for (int number = 0; number < num_pinned; number++)
        if ((char *)memory >= pinned[number].begin && (char *)memory < pinned[number].end)
            attributes->type = cudaMemoryTypeHost;
    return 0;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute number, CUdeviceptr memory) {
    *(CUdeviceptr *)value = memory;
    return 0;
}

cudaError_t cudaMemcpyAsync(
    void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    memcpy(to, from, size);
    return 0;
}

cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
    *unused = *total = (size_t)80 << 30;
    return 0;
}

/* Streams, events, contexts, kernels. */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    *stream = (cudaStream_t)&token;
    return 0;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return 0;
}

cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
    cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
    size_t *num_nodes) {
    *status = cudaStreamCaptureStatusNone;
    return 0;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return 0;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = (cudaEvent_t)&token;
    return 0;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t first, cudaEvent_t last) {
    *milliseconds = 1;
    return 0;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return 0;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = (CUcontext)&token;
    return 0;
}

CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)&token; return 0; }

CUresult cuModuleLoad(CUmodule *module, const char *path) {
    *module = (CUmodule)&token;
    return 0;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = (CUmodule)&token;
    return 0;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)&token;
    return 0;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute number, CUfunction function) {
    *value = number == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return 0;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->ptxVersion = attributes->binaryVersion = capability();
    return 0;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *function, int threads, size_t shared, unsigned flags) {
    *blocks = 1;
    return 0;
}

const char *cudaGetErrorString(cudaError_t error) { return "refused by the stand-in GPU"; }
const char *cudaGetErrorName(cudaError_t error) { return "refused by the stand-in GPU"; }

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = "refused by the stand-in GPU";
    return 0;
}

/* What succeeds and does nothing. The headers declare these names with arguments, which nothing
   here reads. */
#define SUCCEEDS(name)                     \
    int stand_in_##name(void) __asm__(#name); \
    int stand_in_##name(void) { return 0; }

SUCCEEDS(cuCtxGetDevice)
SUCCEEDS(cuCtxGetLimit)
SUCCEEDS(cuCtxPopCurrent)
SUCCEEDS(cuCtxPushCurrent)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuInit)
SUCCEEDS(cuLaunchKernel)
SUCCEEDS(cuLaunchKernelEx)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuOccupancyMaxActiveClusters)
SUCCEEDS(cuPointerGetAttributes)
SUCCEEDS(cuStreamIsCapturing)
SUCCEEDS(cuTensorMapEncodeIm2col)
SUCCEEDS(cuTensorMapEncodeTiled)
SUCCEEDS(cudaDeviceSynchronize)
SUCCEEDS(cudaEventDestroy)
SUCCEEDS(cudaEventQuery)
SUCCEEDS(cudaEventRecord)
SUCCEEDS(cudaEventRecordWithFlags)
SUCCEEDS(cudaEventSynchronize)
SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaLaunchKernel)
SUCCEEDS(cudaLaunchKernelExC)
SUCCEEDS(cudaMemsetAsync)
SUCCEEDS(cudaPeekAtLastError)
SUCCEEDS(cudaSetDevice)
SUCCEEDS(cudaStreamQuery)
SUCCEEDS(cudaStreamSynchronize)
SUCCEEDS(cudaStreamWaitEvent)

/* The functions of the driver that torch looks up by name. */
cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result) {
    int is_context = !strcmp(name, "cuDevicePrimaryCtxGetState");
    *function = is_context ? (void *)cuDevicePrimaryCtxGetState : (void *)stand_in_cuInit;
    if (result)
        *result = cudaDriverEntryPointSuccess;
    return 0;
}
