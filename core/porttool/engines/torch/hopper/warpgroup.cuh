// The tensor cores of a warpgroup. Behind machine.cuh; defined outside: BLOCK_M, the rows of a
// tile, and BF16.

// A matrix of 128-byte rows in shared memory, eight rows of 16-byte units swizzled together.
__device__ __forceinline__ u64 described(u32 address) {
    return (u64(address & 0x3ffff) >> 4) | (u64(1) << 16) | (u64(64) << 32) | (u64(1) << 62);
}

#define S1(i) "+f"(sum[i])
#define S4(i) S1(i), S1(i + 1), S1(i + 2), S1(i + 3)
#define S8(i) S4(i), S4(i + 4)
#define S16(i) S8(i), S8(i + 8)
#define S32(i) S16(i), S16(i + 16)
#if BLOCK_M == 16
#define SHAPE "m64n16k16"
#define PLACES "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9"
#define SUM_REGISTERS S8(0)
#elif BLOCK_M == 32
#define SHAPE "m64n32k16"
#define PLACES "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17"
#define SUM_REGISTERS S16(0)
#elif BLOCK_M == 64
#define SHAPE "m64n64k16"
#define PLACES                                                                \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33"
#define SUM_REGISTERS S32(0)
#elif BLOCK_M == 128
#define SHAPE "m64n128k16"
#define PLACES                                                                         \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65"
#define SUM_REGISTERS S32(0), S32(32)
#else
#error "a tile has 16, 32, 64 or 128 rows"
#endif
#if BF16
#define KINDS ".f32.bf16.bf16"
#else
#define KINDS ".f32.f16.f16"
#endif

constexpr int HELD = BLOCK_M / 2;  // sums of a thread

// sum [64, BLOCK_M] += w [64, 16] x [16, BLOCK_M], a warpgroup.
__device__ __forceinline__ void multiply_tile(float (&sum)[HELD], u64 w, u64 x) {
    asm volatile("wgmma.mma_async.sync.aligned." SHAPE KINDS " " PLACES ", 1, 1, 1, 0, 0;"
                 : SUM_REGISTERS
                 : "l"(w), "l"(x));
}

// Products are enqueued between these two, as a group; then all but the last few groups are
// awaited.
__device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int LEFT>
__device__ __forceinline__ void await_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// What the compiler must not keep elsewhere while the tensor cores write it.
__device__ __forceinline__ void pinned(float (&sum)[HELD]) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}
