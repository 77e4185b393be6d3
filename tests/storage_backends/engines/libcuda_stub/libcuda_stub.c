/* A stand-in for libcuda.so.1 that has no device, so that the real kvikio does host I/O on a machine without a driver.
 *
 * kvikio looks up every one of these names when it starts, and asks cuPointerGetAttribute(s) of each buffer whether it is
 * host or device memory. Every call but one answers CUDA_ERROR_NOT_INITIALIZED, which kvikio takes for "host memory" there
 * and for "no device" elsewhere. It says nothing about how kvikio behaves on a GPU. conftest.py compiles it.
 */

#define SUCCESS 0
#define NOT_INITIALIZED 3

/* The exception: kvikio checks it while it builds the very table that its error path needs, and hangs when it fails. */
int cuDriverGetVersion(int *version) {
    *version = 12000;
    return SUCCESS;
}

#define STUB(name) \
    int name(void) { return NOT_INITIALIZED; }

#define STUB_V2(name) \
    STUB(name)        \
    STUB(name##_v2)

STUB(cuInit)
STUB(cuGetErrorName)
STUB(cuGetErrorString)
STUB(cuDeviceGet)
STUB(cuDeviceGetAttribute)
STUB(cuDeviceGetCount)
STUB(cuDevicePrimaryCtxRetain)
STUB_V2(cuDevicePrimaryCtxRelease)
STUB_V2(cuCtxCreate)
STUB(cuCtxCreate_v3)
STUB(cuCtxCreate_v4)
STUB_V2(cuCtxDestroy)
STUB(cuCtxGetCurrent)
STUB_V2(cuCtxGetDevice)
STUB_V2(cuCtxPushCurrent)
STUB_V2(cuCtxPopCurrent)
STUB(cuPointerGetAttribute)
STUB(cuPointerGetAttributes)
STUB_V2(cuMemGetAddressRange)
STUB(cuMemHostAlloc)
STUB(cuMemFreeHost)
STUB_V2(cuMemHostRegister)
STUB(cuMemHostUnregister)
STUB(cuMemcpyAsync)
STUB_V2(cuMemcpyHtoDAsync)
STUB_V2(cuMemcpyDtoHAsync)
STUB_V2(cuMemcpyBatchAsync)
STUB(cuStreamCreate)
STUB_V2(cuStreamDestroy)
STUB(cuStreamSynchronize)
STUB_V2(cuStreamGetCtx)
STUB(cuEventCreate)
STUB_V2(cuEventDestroy)
STUB(cuEventRecord)
STUB(cuEventQuery)
STUB(cuEventSynchronize)
STUB(cuLaunchHostFunc)
