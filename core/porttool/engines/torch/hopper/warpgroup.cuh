// The tensor cores of a warpgroup. Behind machine.cuh; defined outside: BF16 and, for products of
// two factors in shared memory, BLOCK_M, the rows of a tile.

// A matrix of 128-byte rows in shared memory, eight rows of 16-byte units swizzled together.
__device__ __forceinline__ u64 described(u32 address) {
    return (u64(address & 0x3ffff) >> 4) | (u64(1) << 16) | (u64(64) << 32) | (u64(1) << 62);
}

// The same turned: rows are the inner dimension, and `apart` bytes lie between 64 columns.
__device__ __forceinline__ u64 described_turned(u32 address, u32 apart) {
    return (u64(address & 0x3ffff) >> 4) | (u64(apart >> 4) << 16) | (u64(64) << 32) |
           (u64(1) << 62);
}

// Registers of a thread from here on, of all that a multiprocessor has; by a whole warpgroup.
template <int COUNT>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void leave_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

#define S1(i) "+f"(sum[i])
#define S4(i) S1(i), S1(i + 1), S1(i + 2), S1(i + 3)
#define S8(i) S4(i), S4(i + 4)
#define S16(i) S8(i), S8(i + 8)
#define S32(i) S16(i), S16(i + 16)
#define PLACES8 "{%0, %1, %2, %3, %4, %5, %6, %7}"
#define PLACES16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define PLACES32                                                              \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define PLACES64                                                                       \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#if BF16
#define KINDS ".f32.bf16.bf16"
#else
#define KINDS ".f32.f16.f16"
#endif
#define PRODUCT "wgmma.mma_async.sync.aligned."

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
template <int N>
__device__ __forceinline__ void pinned(float (&sum)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// sum [64, 64 or 128] += or = w [64, 16] x [16, as wide], a warpgroup. A warp holds 16 rows of w as
// multiply_add's first factor; x lies by columns or, turned, by rows.
template <bool TURNED, bool ADDED>
__device__ __forceinline__ void multiply_held(float (&sum)[32], uint4 w, u64 x) {
    asm volatile(PRODUCT "m64n64k16" KINDS " " PLACES32
                         ", {%32, %33, %34, %35}, %36, %37, 1, 1, %38;"
                 : S32(0)
                 : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "l"(x), "n"(ADDED), "n"(TURNED));
}

template <bool TURNED, bool ADDED>
__device__ __forceinline__ void multiply_held(float (&sum)[64], uint4 w, u64 x) {
    asm volatile(PRODUCT "m64n128k16" KINDS " " PLACES64
                         ", {%64, %65, %66, %67}, %68, %69, 1, 1, %70;"
                 : S32(0), S32(32)
                 : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "l"(x), "n"(ADDED), "n"(TURNED));
}

// The same with w in shared memory, as rows.
template <bool ADDED>
__device__ __forceinline__ void multiply_shared(float (&sum)[64], u64 w, u64 x) {
    asm volatile(PRODUCT "m64n128k16" KINDS " " PLACES64 ", %64, %65, %66, 1, 1, 0, 0;"
                 : S32(0), S32(32)
                 : "l"(w), "l"(x), "n"(ADDED));
}

#ifdef BLOCK_M
#if BLOCK_M == 16
#define SHAPE "m64n16k16"
#define FACTORS_PLACES PLACES8 ", %8, %9"
#define SUM_REGISTERS S8(0)
#elif BLOCK_M == 32
#define SHAPE "m64n32k16"
#define FACTORS_PLACES PLACES16 ", %16, %17"
#define SUM_REGISTERS S16(0)
#elif BLOCK_M == 64
#define SHAPE "m64n64k16"
#define FACTORS_PLACES PLACES32 ", %32, %33"
#define SUM_REGISTERS S32(0)
#elif BLOCK_M == 128
#define SHAPE "m64n128k16"
#define FACTORS_PLACES PLACES64 ", %64, %65"
#define SUM_REGISTERS S32(0), S32(32)
#else
#error "a tile has 16, 32, 64 or 128 rows"
#endif

constexpr int HELD = BLOCK_M / 2;  // sums of a thread

// sum [64, BLOCK_M] += w [64, 16] x [16, BLOCK_M], a warpgroup.
__device__ __forceinline__ void multiply_tile(float (&sum)[HELD], u64 w, u64 x) {
    asm volatile(PRODUCT SHAPE KINDS " " FACTORS_PLACES ", 1, 1, 1, 0, 0;"
                 : SUM_REGISTERS
                 : "l"(w), "l"(x));
}
#endif
