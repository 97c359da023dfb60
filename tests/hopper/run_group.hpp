// Behind attend_group.cu: its threads, and what the test calls.

static const Arguments* given;

static void thread_main() {
    cluster_attention(*given);
    running->done = true, ++moved;
}

extern "C" int arguments_bytes() { return sizeof(Arguments); }

// Run the whole grid; 0, or 1 if a cluster hung.
extern "C" int run(const Arguments* arguments, int programs_wide, int seed, const Late* late,
                   int n_late) {
    given = arguments;
    chance.seed(seed);
    preceded = false;
    for (int first = 0; first < programs_wide; first += SPLIT)
        if (!run_together(first, 0, SPLIT, WARPS * 32 + 32, late, n_late)) return 1;
    return 0;
}
