//! What a start finds: every batch that came to be, and nothing of those that did not.

use super::record::tests::record;
use super::*;
use crate::files::About;
use crate::files::tests::Directory;

fn open(directory: &Directory) -> (Files, Batches, Queue) {
    let files = Files::open(directory.path().join("files")).unwrap();
    let (batches, queue) = Batches::open(directory.path().join("batches"), files.clone()).unwrap();
    (files, batches, queue)
}

fn upload(files: &Files, text: &str) -> String {
    let mut draft = files.begin("a").unwrap();
    draft.write(text.as_bytes()).unwrap();
    let about = About { filename: "in".to_owned(), purpose: "batch".to_owned(), lifetime_s: None };
    files.keep(draft, about).unwrap().id
}

fn order(input_file_id: String) -> Order {
    let model = record("");
    Order {
        tenant: "a".into(),
        endpoint: model.endpoint,
        input_file_id,
        completion_window: model.completion_window,
        window_s: 60,
        metadata: None,
        output_lifetime_s: None,
    }
}

fn queued(queue: &mut Queue) -> Vec<String> {
    std::iter::from_fn(|| queue.try_recv().ok()).map(|batch| batch.record().id).collect()
}

#[test]
fn what_is_not_over_is_queued_again_with_its_input() {
    let directory = Directory::new();
    let (files, batches, mut queue) = open(&directory);
    let file = upload(&files, "lines");
    let made = [0; 3].map(|_| batches.create(order(file.clone())).unwrap());
    let ids = made.each_ref().map(|batch| batch.record().id);
    assert_eq!(queued(&mut queue), ids);
    made[0].change(|record| record.reach(Status::Completed, 3)).unwrap();
    assert!(made[1].cancel().unwrap());
    assert!(!made[0].cancel().unwrap());
    assert!(files.delete("a", &file).unwrap());
    assert!(batches.create(order(file)).is_err());
    drop((batches, queue));
    let (_, batches, mut queue) = open(&directory);
    let mut left = ids[1..].to_vec();
    left.sort();
    assert_eq!(queued(&mut queue), left);
    assert_eq!(batches.list("a").len(), 3);
    assert_eq!(batches.list("b").len(), 0);
    assert!(batches.get("b", &ids[0]).is_none());
    let statuses = ids.each_ref().map(|id| batches.get("a", id).unwrap().record().status);
    assert_eq!(statuses, [Status::Completed, Status::Cancelling, Status::Validating]);
    assert_eq!(std::fs::read_to_string(batches.get("a", &ids[2]).unwrap().input()).unwrap(), "lines");
    assert!(!batches.get("a", &ids[0]).unwrap().input().exists());
}

#[test]
fn half_a_batch_is_removed_and_what_is_not_understood_is_let_alone() {
    let directory = Directory::new();
    let (files, batches, _queue) = open(&directory);
    let made = batches.create(order(upload(&files, "lines"))).unwrap();
    let path = made.directory.join(RECORD);
    let newer = made.directory.with_file_name("batch_newer");
    let half = made.directory.with_file_name("batch_half");
    for (directory, name) in [(&newer, RECORD), (&half, "batch.json.tmp")] {
        std::fs::create_dir(directory).unwrap();
        std::fs::write(directory.join(INPUT), "lines").unwrap();
        let text = std::fs::read_to_string(&path).unwrap().replace("\"format\":1", "\"format\":2");
        std::fs::write(directory.join(name), text).unwrap();
    }
    let (_, batches, _queue) = open(&directory);
    assert_eq!(batches.list("a").len(), 1);
    assert!(newer.join(INPUT).exists() && newer.join(RECORD).exists() && !half.exists());
}
