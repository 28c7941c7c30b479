//! Executors that break the rule, so that the grid can be seen to fail.

use mainstay_backend_api::{
    CopyDone, Executor, KvLayout, NumericClass, PageRead, PageRef, Step, StepError, StepOutput, StoredPage,
    Ticket,
};

use crate::world::Wrap;

/// Names and executors.
pub(crate) const CONTROLS: [(&str, Wrap); 2] = [
    ("a kernel whose result depends on the chunk", |inner| {
        Box::new(Wrong { inner, how: How::ByChunk, odd: false })
    }),
    ("a restore that flips a bit", |inner| Box::new(Wrong { inner, how: How::Restore, odd: false })),
];

#[derive(PartialEq)]
enum How {
    ByChunk,
    Restore,
}

struct Wrong {
    inner: Box<dyn Executor>,
    how: How,
    odd: bool,
}

impl Executor for Wrong {
    fn kv_layout(&self) -> &KvLayout {
        self.inner.kv_layout()
    }

    fn numeric_class(&self) -> NumericClass {
        self.inner.numeric_class()
    }

    fn submit(&mut self, step: &Step) -> Result<(), StepError> {
        self.odd = step.tokens.len() % 2 == 1;
        self.inner.submit(step)
    }

    fn finish(&mut self, out: &mut StepOutput) -> Result<(), StepError> {
        self.inner.finish(out)?;
        if self.how == How::ByChunk && self.odd {
            // One unit in the last place: the order of one sum.
            for (_, logprob) in out.top_logprobs.iter_mut().flatten() {
                *logprob = f32::from_bits(logprob.to_bits() ^ 1);
            }
        }
        Ok(())
    }

    fn start_read(&mut self, pages: &[PageRead], ticket: Ticket) {
        self.inner.start_read(pages, ticket);
    }

    fn start_write(&mut self, mut pages: Vec<(PageRef, StoredPage)>, ticket: Ticket) {
        if self.how == How::Restore {
            for (_, bytes) in &mut pages {
                let mut wrong = (**bytes).as_ref().to_vec();
                wrong[0] ^= 1;
                *bytes = Box::new(wrong);
            }
        }
        self.inner.start_write(pages, ticket);
    }

    fn poll(&mut self, done: &mut Vec<CopyDone>) {
        self.inner.poll(done);
    }
}
