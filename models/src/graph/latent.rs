//! Attention over one narrow row a token: multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

use super::{Matrix, Value};

/// Of a token only its latent row and a key part that all heads share are kept. Head `h` of `heads` sees the key
/// `[K_h latent, key]` and the value `V_h latent`, where `K_h` and `V_h` are rows of `expand`: a backend may as well
/// attend with `[K_h^T q, ..]` to the latent rows themselves. Every row attends to its own sequence up to itself; what
/// this step's tokens add is appended to the layer's pages first.
#[derive(Clone, Debug, PartialEq)]
pub struct AttendLatent {
    /// Queries `[tokens, heads * (plain_dim + key_dim)]`.
    pub q: Value,
    /// Latent rows `[tokens, latent]`.
    pub latent: Value,
    /// The shared part of the keys `[tokens, key_dim]`.
    pub key: Value,
    /// `[heads * (plain_dim + value_dim), latent]`: for each head `K_h`, then `V_h`.
    pub expand: Matrix,
    /// Query heads.
    pub heads: usize,
    /// Elements of a head's key that are made of the latent row.
    pub plain_dim: usize,
    /// Elements of a head's key that are shared.
    pub key_dim: usize,
    /// Elements of a head's value.
    pub value_dim: usize,
    /// Multiplies q . k.
    pub scale: f32,
}

impl AttendLatent {
    /// Width of a latent row.
    pub fn latent_dim(&self) -> usize {
        self.expand.cols
    }

    /// The width of its rows, given those of queries, latent rows and keys.
    pub(super) fn width(&self, found: (usize, usize, usize)) -> Result<usize, String> {
        let want = (self.heads * (self.plain_dim + self.key_dim), self.latent_dim(), self.key_dim);
        if want != found {
            return Err(format!(
                "expected widths {want:?} of queries, latent rows and keys, found {found:?}"
            ));
        }
        let (rows, expected) = (self.expand.rows(), self.heads * (self.plain_dim + self.value_dim));
        if rows != expected || self.heads == 0 {
            return Err(format!("expected {expected} rows for {} heads, found {rows}", self.heads));
        }
        Ok(self.heads * self.value_dim)
    }
}
