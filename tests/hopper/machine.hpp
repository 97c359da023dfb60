// A Hopper GPU, as far as the kernels of engines/torch/hopper see it, on a CPU: this stands in
// place of machine.cuh. Every thread is a fiber; which runs next, which warps rest a while, and
// when a copy that was asked for is done, is drawn at random. Barriers count as the machine's do.
// So a slot that is given back too early, a wait that is missing or a barrier that nobody completes
// shows, as a wrong number or as a program that no longer moves. What PTX instructions do is taken
// from their documentation. A word that is told is seen at once and everywhere: what a GPU may
// reorder between programs is not emulated.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
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
struct uint4 {
    u32 x, y, z, w;
};
struct Index {
    int x, y;
};

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __constant__

constexpr int UNIT = 16;
constexpr float LOWEST = -3.402823466e38f;
constexpr int NOBODY = 0x7fffffff;

constexpr int most(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
using std::fmaxf;
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline u32 __float_as_uint(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float __uint_as_float(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline u16 __ldg(const u16* from) { return *from; }
inline u32 __byte_perm(u32 a, u32 b, u32 which) {
    const u64 both = u64(b) << 32 | a;
    u32 bytes = 0;
    for (int i = 0; i < 4; ++i) bytes |= u32(both >> (which >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return bytes;
}
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

struct Chance {  // numbers drawn at random (xorshift64*, Vigna 2016; <random> is slow to compile)
    u64 state;

    void seed(int from) { state = (from + 1) * 0x9e3779b97f4a7c15; }
    u32 operator()() {
        state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
        return state * 0x2545f4914f6cdd1d >> 32;
    }
};

struct Tile {  // of a product that was enqueued
    float* sum;
    u32 w, x;
    uint4 held = {};  // in place of w
    int columns = 0;  // of one with a factor that is held, else 0
    bool turned = false, added = true;
    u32 apart = 0;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    int program = 0, thread = 0;
    bool done = false;
    long cluster_generation = 0;
    std::vector<std::vector<Tile>> groups;
    std::vector<Tile> group;
    size_t multiplied = 0;           // of the groups
    bool (*ready)(void*) = nullptr;  // whether what it awaits is there
    void* awaited = nullptr;
};

struct Block {
    char* memory;
    Index block;
    std::map<int, Meeting> named;  // barriers; 100 and more are warps' own
    float exchanged[32][2][32];    // by warps, in turn, and lanes
    uint4 left[32][32];            // factors of a warp's product
    uint2 right[32][32];
    bool let_next;  // start, the kernel that follows
    int threads;    // that have not ended
};

#ifndef BASE
#define BASE 1040  // where shared memory begins: a multiple of 16 and no more
#endif
constexpr u32 FAR = 1u << 24;  // times a program's number and 1: an address in its memory
static std::vector<Fiber> fibers;
static std::vector<Block> programs;      // that run together
static std::map<u32, Barrier> barriers;  // by far addresses
struct Copy {
    long due;  // not before this turn
    std::function<void()> make;
};
static std::vector<Copy> copies;
static long turn;
static Meeting cluster_barrier;
static bool astray;  // something reached, or read, a program that had ended
static Fiber* running;
static ucontext_t scheduler;
static long moved;     // events that may let somebody go on
static bool preceded;  // the kernel before has ended
static Chance chance;

// Most copies take a few turns, some very long.
inline void enqueue(std::function<void()> make) {
    copies.push_back({turn + (chance() % 8 ? chance() % 4 : chance() % 300), std::move(make)});
}

inline Block& mine() { return programs[running->program]; }
inline void pause() { swapcontext(&running->context, &scheduler); }
// Whoever waits is asked for without being run: changing fibers takes system calls.
template <typename Done>
void wait_until(Done done) {
    if (!done()) {
        running->awaited = &done;
        running->ready = [](void* awaited) { return (*static_cast<Done*>(awaited))(); };
        pause();
        running->ready = nullptr;
    }
    ++moved;
}

#define threadIdx (Index{running->thread, 0})
#define blockIdx (mine().block)
#define gridDim (Index{static_cast<int>(programs.size()), 1})  // where all run together

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
inline void reach(u32 far) { astray = astray || !programs[far / FAR - 1].threads; }
inline Barrier& barrier_at(u32 address) {
    reach(far_address(address));
    return barriers[far_address(address)];
}

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
inline float two_to(float power) { return std::exp2(power); }
inline void arrive_bytes(u32 barrier, u32 bytes) {
    Barrier& b = barrier_at(barrier);
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

template <int NAME, int MEMBERS>
void pass() {
    mine().named[NAME].arrive(MEMBERS), ++moved;
}
inline void meet_all(int name, int threads) {
    Meeting& meeting = mine().named[name];
    const long generation = meeting.generation;
    meeting.arrive(threads), ++moved;
    wait_until([&] { return meeting.generation != generation; });
}
inline void meet_some(int name, int members) { meet_all(name, members); }
template <int NAME, int MEMBERS>
void meet() {
    meet_all(NAME, MEMBERS);
}
inline void __syncthreads() { meet_all(0, fibers.size() / programs.size()); }
inline void __syncwarp() { meet_all(100 + running->thread / 32, 32); }
// What a lane gives, in return for what the warp's lane `from` does.
inline float exchange(float value, int from) {
    const int warp = running->thread / 32;
    float* lanes = mine().exchanged[warp][mine().named[100 + warp].generation % 2];
    lanes[running->thread % 32] = value;
    __syncwarp();
    return lanes[from];
}
inline float __shfl_xor_sync(u32, float value, int step) {
    return exchange(value, running->thread % 32 ^ step);
}
inline float __shfl_sync(u32, float value, int from) { return exchange(value, from); }
inline float __shfl_down_sync(u32, float value, int step) {
    const int lane = running->thread % 32;
    return exchange(value, lane + step < 32 ? lane + step : lane);
}
inline int __shfl_xor_sync(u32 all, int value, int step) {
    return __float_as_uint(__shfl_xor_sync(all, __uint_as_float(value), step));
}
inline u32 __shfl_xor_sync(u32 all, u32 value, int step) {
    return __float_as_uint(__shfl_xor_sync(all, __uint_as_float(value), step));
}
inline int __any_sync(u32 all, int some) {
    for (int step = 16; step; step /= 2) some |= __shfl_xor_sync(all, some, step);
    return some;
}
inline int __shfl_sync(u32 all, int value, int from) {
    return __float_as_uint(__shfl_sync(all, __uint_as_float(value), from));
}
inline u32 __shfl_sync(u32 all, u32 value, int from) {
    return __float_as_uint(__shfl_sync(all, __uint_as_float(value), from));
}
inline u32 __ballot_sync(u32 all, bool here) {
    u32 bits = u32(here) << running->thread % 32;
    for (int step = 16; step; step /= 2) bits |= __shfl_xor_sync(all, bits, step);
    return bits;
}
inline int __popc(u32 bits) { return __builtin_popcount(bits); }
inline int __reduce_max_sync(u32 all, int v) {
    for (int step = 16; step; step /= 2) v = max(v, __shfl_xor_sync(all, v, step));
    return v;
}
inline float warp_sum(float v) {
    for (int step = 16; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
    return v;
}

inline u32 narrow(float a, float b) { return narrow(a) | u32(narrow(b)) << 16; }
inline float2 widen(u32 pair) { return {widen_one(pair), widen_one(pair >> 16)}; }
inline void widen8(const char* from, float* to) {
    for (int i = 0; i < 8; ++i) to[i] = widen_one(reinterpret_cast<const u16*>(from)[i]);
}
inline void widen8(uint4 w, float* to) { widen8(reinterpret_cast<const char*>(&w), to); }
inline float2 read_constant(const float* from) { return {from[0], from[1]}; }
inline u32 read_pair(const u16* from) { return from[0] | u32(from[1]) << 16; }

// sum [16, 8] += a [16, 16] b [16, 8], a warp; the fragments of mma.m16n8k16.
inline void multiply_add(float (&sum)[4], uint4 a, uint2 b) {
    const int warp = running->thread / 32, lane = running->thread % 32;
    Block& block = mine();
    block.left[warp][lane] = a, block.right[warp][lane] = b;
    __syncwarp();
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            const uint4 w = block.left[warp][row % 8 * 4 + k % 8 / 2];
            const uint2 x = block.right[warp][column * 4 + k % 8 / 2];
            const u32 words[] = {w.x, w.y, w.z, w.w}, others[] = {x.x, x.y};
            sum[i] += widen_one(words[row / 8 + k / 8 * 2] >> k % 2 * 16) *
                      widen_one(others[k / 8] >> k % 2 * 16);
        }
    __syncwarp();
}

inline uint4 load_rows(u32 address, bool turned) {
    const int warp = running->thread / 32, lane = running->thread % 32;
    Block& block = mine();
    std::memcpy(&block.left[warp][lane], place(address), 16);
    __syncwarp();
    u16 v[8];
    for (int i = 0; i < 8; ++i) {  // two elements of each matrix
        const int matrix = i / 2, row = lane / 4, column = lane % 4 * 2 + i % 2;
        const uint4& from = block.left[warp][matrix * 8 + (turned ? column : row)];
        v[i] = reinterpret_cast<const u16*>(&from)[turned ? row : column];
    }
    __syncwarp();
    uint4 words;
    std::memcpy(&words, v, 16);
    return words;
}
inline uint4 load_matrices(u32 address) { return load_rows(address, false); }
inline uint4 load_matrices_turned(u32 address) { return load_rows(address, true); }
// A thread may be late with what others are to read.
inline void store16(u32 address, uint4 v) {
    if (chance() % 16 == 0)
        for (int turns = chance() % 64; turns; --turns) pause(), ++moved;
    std::memcpy(place(address), &v, 16);
}

// ---- words that carry their own news ----

struct Word {
    u32 bits, flag;
    bool of(u32 other) const { return flag == other; }
};
struct Words {
    Word a, b;
    bool of(u32 flag) const { return a.of(flag) && b.of(flag); }
};

inline void tell(u64* to, u32 bits, u32 flag) { *to = u64(flag) << 32 | bits, ++moved; }
inline void tell(u64* to, float value, u32 flag) { tell(to, __float_as_uint(value), flag); }
inline Word peek(const u64* from) {
    pause();
    return {u32(*from), u32(*from >> 32)};
}
inline Words peek(const u64* from, int pair) {
    return {peek(from + 2 * pair), peek(from + 2 * pair + 1)};
}
inline u32 count_up(u32* at) {
    pause();
    return ++moved, (*at)++;
}
inline float hear(const u64* from, u32 flag) {
    wait_until([&] { return u32(*from >> 32) == flag; });
    return __uint_as_float(*from);
}
template <int N>
void hear(float (&heard)[N], const u64* const (&places)[N], u32 flag) {
    for (int i = 0; i < N; ++i) heard[i] = hear(places[i], flag);
}
template <int N>
void hear(Words (&heard)[N], const u64* from, int first, int step, int end, u32 flag) {
    for (int i = 0; i < N; ++i) {
        const int pair = first + i * step;
        if (pair >= end) continue;
        wait_until([&] {
            return u32(from[2 * pair] >> 32) == flag && u32(from[2 * pair + 1] >> 32) == flag;
        });
        heard[i] = peek(from, pair);
    }
}
inline void fence_all() {}
inline void fence_copies() {}
inline void copy_once(u32 to, const void* from, u32 bytes, u32 barrier) {
    copy(to, from, bytes, barrier);
}

// ---- running ----

inline char* emulated_memory() { return mine().memory; }

// Of memory that the kernel before writes, what it holds when that ends.
struct Late {
    void* to;
    const void* from;
    long bytes;
};

static void thread_main();

// Run programs together; false if nothing moves any more before all threads have ended.
static bool run_together(int first, int row, int size, int threads, const Late* late, int n_late) {
    std::vector<std::unique_ptr<char[]>> memory;
    programs.assign(size, {}), fibers.clear(), barriers.clear(), copies.clear();
    cluster_barrier = {}, astray = false;
    for (int p = 0; p < size; ++p) {
        memory.emplace_back(new char[SHARED + 3072]);
        std::memset(memory[p].get(), 0xff, SHARED + 3072);  // NaN
        char* begin = memory[p].get();
        programs[p].memory = begin + (-reinterpret_cast<uintptr_t>(begin) & 1023) + BASE % 1024;
        programs[p].block = {first + p, row}, programs[p].threads = threads;
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
    std::vector<long> idle(fibers.size() / 32);  // warps: until these turns
    long rested = 0;                             // when all idle ones go on
    if (size > 1 && chance() % 2) {              // one program begins late
        const size_t first = chance() % size * (threads / 32);
        rested = turn + chance() % 2048;
        for (int i = 0; i < threads / 32; ++i) idle[first + i] = rested;
    }
    int left = fibers.size();
    for (int still = 0; left && still < 8;) {
        const long before = moved;
        if (!preceded && chance() % 16 == 0) {
            for (int i = 0; i < n_late; ++i) std::memcpy(late[i].to, late[i].from, late[i].bytes);
            preceded = true, ++moved;
        }
        const size_t begin = chance() % fibers.size();
        for (size_t i = 0; i < fibers.size(); ++i) {
            Fiber& fiber = fibers[(begin + i) % fibers.size()];
            if (fiber.done || idle[(begin + i) % fibers.size() / 32] > turn) continue;
            if (chance() % 8 == 0) continue;
            running = &fiber;
            if (fiber.ready && !fiber.ready(fiber.awaited)) continue;
            swapcontext(&scheduler, &fiber.context);
            left -= fiber.done, programs[fiber.program].threads -= fiber.done;
        }
        ++turn;
        for (size_t i = 0; i < copies.size();)
            if (copies[i].due <= turn) {
                copies[i].make(), ++moved;
                copies.erase(copies.begin() + i);
            } else
                ++i;
        if (moved != before && chance() % 256 == 0) {
            long& until = idle[chance() % idle.size()];
            until = turn + chance() % 512, rested = rested > until ? rested : until;
        }
        const bool coming = !copies.empty() || !preceded || rested > turn;
        still = moved != before || coming ? 0 : still + 1;
    }
    return left == 0 && copies.empty() && !astray;
}
