// Behind attend.cu or attend_group.cu: its threads, and what the test calls.

static const Arguments* given;

#ifdef SPLIT  // programs of a cluster
constexpr int EXTRA_WARPS = 1;
static int together_of(int) { return SPLIT; }
static void thread_main() {
    cluster_attention(*given);
    running->done = true, ++moved;
}
#else
constexpr int EXTRA_WARPS = 3;
static int together_of(int programs) { return programs; }
static void thread_main() {
    balanced_attention(*given);
    running->done = true, ++moved;
}
#endif

extern "C" int arguments_bytes() { return sizeof(Arguments); }

// Run the whole grid, those together that may wait for each other; 0, or 1 if some hung or kept the
// next kernel waiting.
extern "C" int run(const Arguments* arguments, int programs_wide, int seed, const Late* late,
                   int n_late) {
    given = arguments;
    chance.seed(seed);
    preceded = false;
    const int size = together_of(programs_wide), threads = (WARPS + EXTRA_WARPS) * 32;
    for (int first = 0; first < programs_wide; first += size)
        if (!run_together(first, 0, size, threads, late, n_late) || !all_let_next_start()) return 1;
    return 0;
}
