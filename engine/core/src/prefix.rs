//! How much of a sequence known pages let it begin with: layers with a window need only the last of them.

use mainstay_backend_api::{PAGE_TOKENS, oldest_page};

/// The most full pages, of `most`, after which a sequence can go on: in every windowed group the pages that the next
/// token sees are there, as `has(group, page)` tells. Groups without a window are not asked.
pub(crate) fn usable(most: usize, windows: &[Option<usize>], has: impl Fn(usize, usize) -> bool) -> usize {
    let mut pages = most;
    // Whoever begins behind a missing page, and not beyond its window, misses it too.
    while let Some(missing) = missing(pages * PAGE_TOKENS, windows, &has) {
        pages = missing;
    }
    pages
}

/// A full page that is missing to go on after this many tokens; see [`usable`].
pub(crate) fn missing(
    tokens: usize,
    windows: &[Option<usize>],
    has: impl Fn(usize, usize) -> bool,
) -> Option<usize> {
    let windowed = (0..windows.len()).filter(|&group| windows[group].is_some());
    let missing = |group: usize| {
        let mut needed = oldest_page(windows[group], tokens)..tokens / PAGE_TOKENS;
        needed.rfind(|&page| !has(group, page))
    };
    windowed.filter_map(missing).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What [`usable`] promises, tried for every number of pages.
    fn tried(most: usize, windows: &[Option<usize>], held: &[u32]) -> usize {
        let goes_on = |&pages: &usize| {
            (0..windows.len()).all(|group| {
                let Some(window) = windows[group] else { return true };
                let next = pages * PAGE_TOKENS;
                let seen = |page: usize| (page + 1) * PAGE_TOKENS + window > next + 1;
                (0..pages).all(|page| held[group] >> page & 1 == 1 || !seen(page))
            })
        };
        (0..=most).rev().find(goes_on).expect("nothing is needed for nothing")
    }

    #[test]
    fn it_is_the_most_that_any_window_lets_be() {
        for windows in [[Some(1), Some(70)], [Some(20), None], [Some(32), Some(33)], [Some(100), Some(64)]] {
            for held in 0..1 << 8 {
                for other in [0xff, 0b1111_0111, 0b0011_1100, 0b1000_1111] {
                    let held = [held, other];
                    let found = usable(8, &windows, |group, page| held[group] >> page & 1 == 1);
                    assert_eq!(found, tried(8, &windows, &held), "{windows:?} of {held:?}");
                }
            }
        }
    }

    #[test]
    fn a_tail_needs_less_than_the_page_before_it() {
        let none = |_, _| false;
        // The token at 64 sees back to 45, the token at 90 to 71.
        assert_eq!(missing(64, &[Some(20)], none), Some(1));
        assert_eq!(missing(90, &[Some(20)], none), None);
    }
}
