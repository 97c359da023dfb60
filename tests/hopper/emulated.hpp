// A Hopper GPU, as far as hopper/linear.cu sees it, on a CPU: this stands in place of machine.cuh
// and cluster.cuh. Every thread of a cluster is a fiber; which runs next, and when a copy that was
// asked for is done, is drawn at random. Copies swizzle, products are computed when they are
// awaited, from shared memory as it is then, barriers count as the machine's do. So a slot that is
// given back too early, a wait that is missing or a barrier that nobody completes shows, as a wrong
// number or as a program that no longer moves. What PTX instructions do is taken from their
// documentation.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
struct uint2 {
    u32 x, y;
};
struct Index {
    int x, y;
};

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)

constexpr int most(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// ---- fibers ----

struct Barrier {
    int count = 0, pending = 0;
    long bytes = 0;
    u32 phase = 0;

    void complete() {
        if (pending == 0 && bytes == 0) phase ^= 1, pending = count;
    }
};

struct Meeting {  // of a number of threads, again and again
    int arrived = 0;
    long generation = 0;

    void arrive(int threads) {
        if (++arrived == threads) arrived = 0, ++generation;
    }
};

struct Product {
    float* sum;
    u32 w, x;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    int program = 0, thread = 0;
    bool done = false;
    long cluster_generation = 0;
    std::vector<std::vector<Product>> groups;
    std::vector<Product> group;
    size_t multiplied = 0;  // of the groups
};

struct Program {
    char* memory;
    Index block;
    std::map<int, Meeting> named;  // barriers; 100 and more are warps' own
    float exchanged[32][32];       // by warps and lanes
};

constexpr u32 BASE = 1040;     // where shared memory begins: a multiple of 16 and no more
constexpr u32 FAR = 1u << 24;  // times a program's number and 1: an address in its memory
static std::vector<Fiber> fibers;
static std::vector<Program> programs;
static std::map<u32, Barrier> barriers;  // by far addresses
struct Copy {
    long due;  // not before this turn
    std::function<void()> make;
};
static std::vector<Copy> copies;
static long turn;
static Meeting cluster_barrier;
static Fiber* running;
static ucontext_t scheduler;
static long moved;     // events that may let somebody go on
static bool preceded;  // the kernel before has ended
static std::mt19937 chance;

// Most copies take a few turns, some very long.
inline void enqueue(std::function<void()> make) {
    copies.push_back({turn + (chance() % 8 ? chance() % 4 : chance() % 300), std::move(make)});
}

inline Program& mine() { return programs[running->program]; }
inline void pause() { swapcontext(&running->context, &scheduler); }
template <typename Done>
void wait_until(Done done) {
    while (!done()) pause();
    ++moved;
}

#define threadIdx (Index{running->thread, 0})
#define blockIdx (mine().block)

inline u32 far_address(u32 address) {
    return address < FAR ? (running->program + 1) * FAR + address : address;
}
inline char* place(u32 address) {
    const u32 far = far_address(address);
    return programs[far / FAR - 1].memory + far % FAR - BASE;
}
inline u32 shared_address(const void* p) {
    return static_cast<u32>(static_cast<const char*>(p) - mine().memory) + BASE;
}
inline u32 address_in(u32 program, u32 address) { return (program + 1) * FAR + address; }
inline Barrier& barrier_at(u32 address) { return barriers[far_address(address)]; }

// ---- machine.cuh ----

inline void barrier_init(u32 barrier, u32 arrivals) {
    barrier_at(barrier) = {static_cast<int>(arrivals), static_cast<int>(arrivals)};
}
inline void barrier_arrive(u32 barrier, u32 times) {
    Barrier& b = barrier_at(barrier);
    b.pending -= times, b.complete(), ++moved;
}
inline void barrier_expect(u32 barrier, u32 bytes) {
    Barrier& b = barrier_at(barrier);
    b.bytes += bytes, --b.pending, b.complete(), ++moved;
}
inline void barrier_wait(u32 barrier, u32 parity) {
    wait_until([&] { return barrier_at(barrier).phase != parity; });
}
inline void arrive_bytes(u32 barrier, u32 bytes) {
    Barrier& b = barriers[barrier];
    b.bytes -= bytes, b.complete();
}
inline void copy(u32 to, const void* from, u32 bytes, u32 barrier) {
    to = far_address(to), barrier = far_address(barrier);
    enqueue([=] { std::memcpy(place(to), from, bytes), arrive_bytes(barrier, bytes); });
}

#if BF16
inline float widen_one(u16 bits) {
    const u32 wide = u32(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}
inline u16 narrow(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#else
inline float widen_one(u16 bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return value;
}
inline u16 narrow(float value) {
    const _Float16 half = value;
    u16 bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
#endif

inline float activate(float x) {
#if ACT_gelu_tanh
    return 0.5f * x * (1.0f + std::tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
#elif ACT_silu
    return x / (1.0f + std::exp(-x));
#else
    return x;
#endif
}

// ---- cluster.cuh ----

struct alignas(64) TensorMap {
    u64 words[16];  // address, three sides, two strides in bytes, three sides of a box
};

inline void let_next_start() {}
inline void await_last() {
    wait_until([] { return preceded; });
}
inline u64 leaving_first() { return 0; }
inline void fence_barriers() {}
inline void fence_shared_copies() {}

inline u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_cube(u32 to, const TensorMap& map, int x, int y, int z, u32 barrier) {
    to = far_address(to), barrier = far_address(barrier);
    const u64* m = map.words;
    enqueue([=] {
        for (u32 k = 0, at = 0; k < m[8]; ++k)
            for (u32 j = 0; j < m[7]; ++j)
                for (u32 i = 0; i < m[6]; ++i, at += 2) {
                    const bool inside = x + i < m[1] && y + j < m[2] && z + k < m[3];
                    const char* from = reinterpret_cast<const char*>(m[0]) + (x + i) * 2 +
                                       (y + j) * m[4] + (z + k) * m[5];
                    const u16 zero = 0;
                    std::memcpy(place(swizzled(to + at)),
                                inside ? from : reinterpret_cast<const char*>(&zero), 2);
                }
        arrive_bytes(barrier, m[6] * m[7] * m[8] * 2);
    });
}
inline void copy_box(u32 to, const TensorMap& map, int inner, int row, u32 barrier, u64) {
    copy_cube(to, map, inner, row, 0, barrier);
}
inline void copy_chunks(u32 to, const TensorMap& map, int row, int chunk, u32 barrier) {
    copy_cube(to, map, 0, row, chunk, barrier);
}

inline void send(u32 to, u32 from, u32 bytes, u32 barrier) {
    from = far_address(from);
    enqueue([=] { std::memcpy(place(to), place(from), bytes), arrive_bytes(barrier, bytes); });
}

inline void cluster_arrive() {
    running->cluster_generation = cluster_barrier.generation;
    cluster_barrier.arrive(fibers.size()), ++moved;
}
inline void cluster_wait() {
    wait_until([] { return cluster_barrier.generation != running->cluster_generation; });
}

template <int NAME, int THREADS>
void pass() {
    mine().named[NAME].arrive(THREADS), ++moved;
}
inline void meet_all(int name, int threads) {
    Meeting& meeting = mine().named[name];
    const long generation = meeting.generation;
    meeting.arrive(threads), ++moved;
    wait_until([&] { return meeting.generation != generation; });
}
template <int NAME, int THREADS>
void meet() {
    meet_all(NAME, THREADS);
}
inline void __syncthreads() { meet_all(0, fibers.size() / programs.size()); }
inline void __syncwarp() { meet_all(100 + running->thread / 32, 32); }
inline float __shfl_xor_sync(u32, float value, int step) {
    float* lanes = mine().exchanged[running->thread / 32];
    lanes[running->thread % 32] = value;
    __syncwarp();
    value = lanes[running->thread % 32 ^ step];
    __syncwarp();
    return value;
}

constexpr int HELD = BLOCK_M / 2;

inline u64 described(u32 address) { return address; }
inline void begin_products() {}
inline void multiply_tile(float (&sum)[HELD], u64 w, u64 x) {
    running->group.push_back({sum, static_cast<u32>(w), static_cast<u32>(x)});
}
inline void commit_products() {
    running->groups.push_back(std::move(running->group));
    running->group.clear();
}
inline float element(u32 base, int row, int k) {
    u16 bits;
    std::memcpy(&bits, place(swizzled(base + row * 128 + k * 2)), 2);
    return widen_one(bits);
}
inline void multiply(const Fiber& fiber, const Product& p) {
    const int warp = fiber.thread / 32 % 4, lane = fiber.thread % 32;
    for (int i = 0; i < HELD; ++i) {
        const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8;
        const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) p.sum[i] += element(p.w, row, k) * element(p.x, column, k);
    }
}
// A warpgroup's products are one operation: where one thread sees its end, they are all done.
template <int LEFT>
void await_products() {
    Fiber* first = running - running->thread % 128;
    const size_t wanted = running->groups.size() - LEFT;
    pause();
    for (Fiber* fiber = first; fiber < first + 128; ++fiber)
        wait_until([&] { return fiber->groups.size() >= wanted; });
    for (Fiber* fiber = first; fiber < first + 128; ++fiber)
        for (; fiber->multiplied < wanted; ++fiber->multiplied)
            for (const Product& p : fiber->groups[fiber->multiplied]) multiply(*fiber, p);
}
inline void pinned(float (&)[HELD]) {}

struct Arguments;
extern "C" void cluster_linear(const Arguments a);
static const Arguments* given;
inline char* emulated_memory() { return mine().memory; }

// Of memory that the kernel before writes, what it holds when that ends.
struct Late {
    void* to;
    const void* from;
    long bytes;
};

static void thread_main();

// Run one cluster; false if nothing moves any more before all threads have ended.
static bool run_cluster(int first, int row, int size, int threads, const Late* late, int n_late) {
    std::vector<std::unique_ptr<char[]>> memory;
    programs.assign(size, {}), fibers.clear(), barriers.clear(), copies.clear();
    cluster_barrier = {};
    for (int p = 0; p < size; ++p) {
        memory.emplace_back(new char[SHARED + 3072]);
        std::memset(memory[p].get(), 0xff, SHARED + 3072);  // NaN
        char* begin = memory[p].get();
        programs[p].memory = begin + (-reinterpret_cast<uintptr_t>(begin) & 1023) + BASE % 1024;
        programs[p].block = {first + p, row};
    }
    fibers.resize(size * threads);
    for (int f = 0; f < size * threads; ++f) {
        Fiber& fiber = fibers[f];
        fiber.program = f / threads, fiber.thread = f % threads;
        fiber.stack.reset(new char[64 << 10]);
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.get(), 0, 64 << 10};
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, thread_main, 0);
    }
    int left = fibers.size();
    for (int still = 0; left && still < 8;) {
        const long before = moved;
        if (!preceded && chance() % 4 == 0) {
            for (int i = 0; i < n_late; ++i) std::memcpy(late[i].to, late[i].from, late[i].bytes);
            preceded = true, ++moved;
        }
        const size_t begin = chance() % fibers.size();
        for (size_t i = 0; i < fibers.size(); ++i) {
            Fiber& fiber = fibers[(begin + i) % fibers.size()];
            if (fiber.done || chance() % 8 == 0) continue;
            running = &fiber;
            swapcontext(&scheduler, &fiber.context);
            left -= fiber.done;
        }
        ++turn;
        for (size_t i = 0; i < copies.size();)
            if (copies[i].due <= turn) {
                copies[i].make(), ++moved;
                copies.erase(copies.begin() + i);
            } else
                ++i;
        still = moved != before || !copies.empty() || !preceded ? 0 : still + 1;
    }
    return left == 0 && copies.empty();
}
