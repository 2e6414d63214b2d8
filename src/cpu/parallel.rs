//! Tasks over threads. What a task computes never depends on who runs it, so results do not depend on the threads.
//!
//! The pools are our own: rayon's global one hangs for ever in a child that was forked after it had been used, and
//! data loaders fork. A child forgets the parent's pools (their threads do not exist there) and makes new ones.

use rayon::{ThreadPool, ThreadPoolBuilder};
use std::ptr::null_mut;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

/// More threads than this are not used.
const MOST: usize = 256;

/// One pool for each number of helpers ever asked for; never freed, as a call may be using it.
static POOLS: [AtomicPtr<ThreadPool>; MOST] = [const { AtomicPtr::new(null_mut()) }; MOST];

/// After a fork, in the child: the inherited pools have no threads. They are leaked, since dropping one would wait.
#[cfg(unix)]
extern "C" fn forget_pools() {
    for pool in &POOLS {
        pool.store(null_mut(), Ordering::Relaxed);
    }
}

fn pool(helpers: usize) -> &'static ThreadPool {
    #[cfg(unix)]
    {
        static REGISTER: Once = Once::new();
        REGISTER.call_once(|| {
            // SAFETY: the handler only stores to atomics, which is allowed between fork and exec.
            unsafe { libc::pthread_atfork(None, None, Some(forget_pools)) };
        });
    }
    let slot = &POOLS[helpers];
    let mut found = slot.load(Ordering::Acquire);
    if found.is_null() {
        let name = |index| format!("moda-attn-{index}");
        let built = ThreadPoolBuilder::new().num_threads(helpers).thread_name(name).build();
        let fresh = Box::into_raw(Box::new(built.expect("the system can start threads")));
        match slot.compare_exchange(null_mut(), fresh, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => found = fresh,
            Err(theirs) => {
                // SAFETY: just made by `into_raw` and seen by nobody else.
                drop(unsafe { Box::from_raw(fresh) });
                found = theirs;
            }
        }
    }
    // SAFETY: a pool in a slot is never freed.
    unsafe { &*found }
}

/// Runs `task(workspace, index)` for every index below `count`, on as many threads as there are workspaces, the calling
/// one among them.
pub(crate) fn run<W: Send>(workspaces: &mut [W], count: usize, task: impl Fn(&mut W, usize) + Sync) {
    let threads = workspaces.len().min(count).min(MOST);
    let next = AtomicUsize::new(0);
    let work = |workspace: &mut W| {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                break;
            }
            task(workspace, index);
        }
    };
    match &mut workspaces[..threads] {
        [] => {}
        [only] => work(only),
        [first, rest @ ..] => pool(rest.len()).in_place_scope(|scope| {
            for workspace in rest {
                scope.spawn(|_| work(workspace));
            }
            work(first);
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let mut seen = vec![Vec::new(); threads];
            run(&mut seen, 100, Vec::push);
            let mut all: Vec<usize> = seen.concat();
            all.sort_unstable();
            assert_eq!(all, (0..100).collect::<Vec<_>>());
        }
    }
}
