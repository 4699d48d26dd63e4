//! Video as SRT: MPEG-TS over UDP, with lost packets sent again by the ends.

use testbed::Testbed;

use crate::common::{self, W, command};

/// Seconds of 25 frames.
const LENGTH: u32 = 8;

/// Frames that are compared: the sender may hang up while the last ones are on their way.
const COMPARED: usize = 175;

const TO_HASHES: [&str; 7] = ["-map", "0:v", "-f", "framemd5", "-frames:v", "175", "-"];

fn ffmpeg(host: &testbed::Host) -> std::process::Command {
    let mut command = command(host, "ffmpeg", "ffmpeg");
    command.args(["-hide_banner", "-loglevel", "error", "-nostdin"]);
    command
}

/// The hash of each frame's picture, without its time.
fn hashes(framemd5: &str) -> Vec<String> {
    let frames = framemd5.lines().filter(|line| !line.starts_with('#'));
    frames.map(|line| line.rsplit(',').next().unwrap().trim().to_owned()).collect()
}

/// Makes a clip of moving pictures and returns the hashes of its frames.
fn make_clip(bed: &Testbed) -> Vec<String> {
    let mut make = ffmpeg(&bed.client);
    make.args(["-f", "lavfi", "-i", &format!("testsrc=size=320x240:rate=25:duration={LENGTH}")]);
    make.args(["-c:v", "mpeg2video", "-b:v", "2M", "-f", "mpegts", "/run/clip.ts"]);
    common::output(make);
    let mut decode = ffmpeg(&bed.client);
    decode.args(["-i", "/run/clip.ts"]).args(TO_HASHES);
    hashes(&String::from_utf8(common::output(decode)).unwrap())
}

beside_changes! {
    /// Every frame decodes at the other end to the picture that was sent.
    fn a_video_stream_loses_no_frame(bed, ["udp 203.0.113.1:9000 10.0.0.10:9000"]) {
        let sent = make_clip(bed);
        let mut receiver = ffmpeg(bed.server());
        receiver.args(["-i", "srt://10.0.0.10:9000?mode=listener"]).args(TO_HASHES);
        let receiver = common::serve(bed.server(), "udp", 9000, receiver);
        let mut sender = ffmpeg(&bed.client);
        sender.args(["-re", "-i", "/run/clip.ts", "-c", "copy", "-f", "mpegts"]);
        sender.arg(format!("srt://{W}:9000?mode=caller"));
        let sender = bed.client.start(sender).unwrap();
        let received = hashes(&common::finish(receiver));
        drop(sender);
        assert_eq!(received.len(), COMPARED, "{received:?}");
        assert!(received == sent, "other pictures: {received:?} of {sent:?}");
    }
}
