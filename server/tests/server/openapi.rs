//! The document of the API, against the server that it is of.

use axum::body::Body;
use axum::http::Request;

use crate::sessions::with_store;
use crate::testbed::{Directory, start};

#[tokio::test]
async fn every_path_of_the_document_is_a_route() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let document = server.get("/openapi.json").await.ok();
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.len() > 30);
    for (path, methods) in paths {
        for method in methods.as_object().unwrap().keys() {
            let place = path.replace("{id}", "nothing").replace("{item}", "nothing");
            let request = Request::builder().method(method.to_uppercase().as_str()).uri(&place);
            let request = request.header("host", "test").header("content-type", "application/json");
            let reply = server.send(request.body(Body::from("{}")).unwrap()).await;
            assert!(!reply.status.is_server_error(), "{method} {path}: {reply:?}");
            assert_ne!(reply.status, 405, "{method} {path}");
            if reply.status == 404 {
                assert_ne!(reply.json()["error"]["code"], "unknown_url", "{method} {path}");
            }
        }
    }
    server.stop().await;
}
