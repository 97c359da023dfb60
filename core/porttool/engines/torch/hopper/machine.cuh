// What every kernel here needs of the machine: asynchronous copies, loads, barriers, numbers,
// words. No header is included: NVRTC compiles this where no CUDA toolkit is installed.
//
// Defined outside: BF16 (0 or 1), SHARED (bytes of shared memory), and what each file says.

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int UNIT = 16;  // bytes of a lane's load from shared memory
constexpr float LOWEST = -3.402823466e38f;
constexpr int NOBODY = 0x7fffffff;

__device__ constexpr int most(int a, int b) { return a > b ? a : b; }

__device__ __forceinline__ u32 shared_address(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

// ---- barriers ----

// Warps that meet at one of the program's barriers, some of them without waiting.
template <int NAME, int MEMBERS>
__device__ __forceinline__ void meet() {
    asm volatile("bar.sync %0, %1;" ::"n"(NAME), "n"(MEMBERS) : "memory");
}

__device__ __forceinline__ void meet_some(int name, int members) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(members) : "memory");
}

template <int NAME, int MEMBERS>
__device__ __forceinline__ void pass() {
    asm volatile("bar.arrive %0, %1;" ::"n"(NAME), "n"(MEMBERS) : "memory");
}

// ---- numbers ----

// Two 16-bit numbers of one word as float32.
__device__ __forceinline__ float2 widen(u32 pair) {
    float2 v;
#if BF16
    v.x = __uint_as_float(pair << 16);
    v.y = __uint_as_float(pair & 0xffff0000u);
#else
    asm("{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(v.x), "=f"(v.y)
        : "r"(pair));
#endif
    return v;
}

__device__ __forceinline__ float widen_one(u16 value) { return widen(value).x; }

// Eight 16-bit numbers.
__device__ __forceinline__ void widen8(uint4 w, float* to) {
    const float2 a = widen(w.x), b = widen(w.y), c = widen(w.z), d = widen(w.w);
    to[0] = a.x, to[1] = a.y, to[2] = b.x, to[3] = b.y;
    to[4] = c.x, to[5] = c.y, to[6] = d.x, to[7] = d.y;
}

__device__ __forceinline__ void widen8(const char* from, float* to) {
    widen8(*reinterpret_cast<const uint4*>(from), to);
}

__device__ __forceinline__ u16 narrow(float value) {
    u16 bits;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
    return bits;
}

// Two numbers as a word of 16-bit ones.
__device__ __forceinline__ u32 narrow(float a, float b) {
    u32 pair;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
#endif
    return pair;
}

__device__ __forceinline__ float two_to(float power) {
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(power));
    return value;
}

// Tensor cores: sum [16, 8] += a [16, 16] b [16, 8], 16-bit factors.
__device__ __forceinline__ void multiply_add(float (&sum)[4], uint4 a, uint2 b) {
#if BF16
#define FACTORS "bf16.bf16"
#else
#define FACTORS "f16.f16"
#endif
    asm("mma.sync.aligned.m16n8k16.row.col.f32." FACTORS
        ".f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory, each row's address by a lane: eight
// lanes after the other. Lane l gets elements 2 (l % 4) and the next of row l / 4 of each, the
// fragments of multiply_add's factors; turned, of the transposed matrices.
__device__ __forceinline__ uint4 load_matrices(u32 address) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ uint4 load_matrices_turned(u32 address) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ void store16(u32 address, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int step = 16; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
    return v;
}

// Two numbers, asked for here and now, however late they are used.
__device__ __forceinline__ float2 read_constant(const float* from) {
    float2 v;
    asm volatile("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(from));
    return v;
}

__device__ __forceinline__ u32 read_pair(const u16* from) {
    u32 v;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(from));
    return v;
}

// ---- words that carry their own news ----

// What programs tell each other travels in 8-byte words, 32 bits and a flag that says of which
// stage they are. A reader asks again until it sees the flag: no barrier of the grid, no fence, one
// way through the L2 cache.
//
// A word's place is written again only after all programs have read it: in every layer each program
// tells words of qkv, of the stream and of hidden, after it has heard all of those before, and
// who writes a place again has heard those. So every program must own a column of each of them,
// or it could fall behind and wait for ever. (That a store is not performed before the loads that
// its value and its being reached depend on is how GPUs work, not a promise of PTX's relaxed
// order.)
struct Word {
    u32 bits, flag;
    __device__ bool of(u32 other) const { return flag == other; }
};

struct Words {
    Word a, b;
    __device__ bool of(u32 flag) const { return a.of(flag) && b.of(flag); }
};

__device__ __forceinline__ void tell(u64* place, u32 bits, u32 flag) {
    const u64 word = static_cast<u64>(flag) << 32 | bits;
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(place), "l"(word) : "memory");
}

__device__ __forceinline__ void tell(u64* place, float value, u32 flag) {
    tell(place, __float_as_uint(value), flag);
}

// The word as it is now.
__device__ __forceinline__ Word peek(const u64* place) {
    u64 word;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(place) : "memory");
    return {static_cast<u32>(word), static_cast<u32>(word >> 32)};
}

// Words 2 `pair` and 2 `pair` + 1 as they are now.
__device__ __forceinline__ Words peek(const u64* places, int pair) {
    u64 a, b;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(a), "=l"(b)
                 : "l"(places + 2 * pair)
                 : "memory");
    return {{static_cast<u32>(a), static_cast<u32>(a >> 32)},
            {static_cast<u32>(b), static_cast<u32>(b >> 32)}};
}

// One more: what it was before.
__device__ __forceinline__ u32 count_up(u32* place) {
    u32 before;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(place)
                 : "memory");
    return before;
}

// One word of the stage.
__device__ __forceinline__ float hear(const u64* place, u32 flag) {
    Word word;
    do {
        word = peek(place);
    } while (!word.of(flag));
    return __uint_as_float(word.bits);
}

// Words of the stage at several places, all asked for together.
template <int N>
__device__ __forceinline__ void hear(float (&heard)[N], const u64* const (&places)[N], u32 flag) {
    bool all;
    do {
        Word words[N];
#pragma unroll
        for (int i = 0; i < N; ++i) words[i] = peek(places[i]);
        all = true;
#pragma unroll
        for (int i = 0; i < N; ++i)
            all = all && words[i].of(flag), heard[i] = __uint_as_float(words[i].bits);
    } while (!all);
}

// Pairs first, first + step, ... below `end`, all asked for together.
template <int N>
__device__ __forceinline__ void hear(Words (&heard)[N], const u64* places, int first, int step,
                                     int end, u32 flag) {
#pragma unroll
    for (int i = 0; i < N; ++i)
        heard[i].a.flag = heard[i].b.flag = first + i * step < end ? flag - 1 : flag;
    bool all;
    do {
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (!heard[i].of(flag)) heard[i] = peek(places, first + i * step);
        all = true;
#pragma unroll
        for (int i = 0; i < N; ++i) all = all && heard[i].of(flag);
    } while (!all);
}

// Before a word is told: what this thread wrote or saw is seen wherever that word is heard. After
// words are heard: what their tellers saw is seen here. Behind a barrier of the program, for all of
// it.
__device__ __forceinline__ void fence_all() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// ---- asynchronous copies to shared memory ----

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier, u32 times) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(times)
                 : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// What is read once a step, weights and cached keys, leaves the L2 cache first.
__device__ __forceinline__ void copy_once(u32 to, const void* from, u32 bytes, u32 barrier) {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

__device__ __forceinline__ void copy(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
}

// Ordinary writes before it are seen by asynchronous copies after it.
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }
