//! Ids of responses and conversations. They name the session they belong to, so that nothing has to be looked up.

use mainstay_engine::store::SessionId;

const RESPONSE: &str = "resp_";
const CONVERSATION: &str = "conv_";
/// Characters of a session's id.
const SESSION_LEN: usize = 26;

/// The id of a new response in a session.
pub(crate) fn response(session: SessionId) -> String {
    format!("{RESPONSE}{session}{:016x}", crate::random::seed())
}

/// The session that a response's id names.
pub(crate) fn session_of_response(id: &str) -> Option<SessionId> {
    id.strip_prefix(RESPONSE)?.get(..SESSION_LEN)?.parse().ok()
}

/// The id of a conversation.
pub(crate) fn conversation(session: SessionId) -> String {
    format!("{CONVERSATION}{session}")
}

/// The session that a conversation is.
pub(crate) fn session_of_conversation(id: &str) -> Option<SessionId> {
    id.strip_prefix(CONVERSATION)?.parse().ok()
}

/// The id of the `index`th item of a response's output: the same whenever its tokens are read.
pub(crate) fn output_item(prefix: &str, response: &str, index: usize) -> String {
    let own = response.strip_prefix(RESPONSE).unwrap_or(response);
    format!("{prefix}{own}{index:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_name_their_session() {
        let session = SessionId(0x0190_1234_5678_9abc);
        assert_eq!(session_of_response(&response(session)), Some(session));
        assert_eq!(session_of_conversation(&conversation(session)), Some(session));
        for id in ["resp_", "resp_missing", "conv_1", "", "resp_ééééééééééééééééé", &conversation(session)]
        {
            assert_eq!(session_of_response(id), None, "{id}");
        }
        assert_eq!(output_item("msg_", "resp_ab", 1), "msg_ab01");
    }
}
