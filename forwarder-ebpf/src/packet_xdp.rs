//! A frame in an XDP buffer.

use aya_ebpf::programs::XdpContext;
use forwarder_common::packet::{OutOfBounds, Packet, Plain};

pub struct XdpPacket<'a> {
    ctx: &'a XdpContext,
}

impl<'a> XdpPacket<'a> {
    #[inline(always)]
    pub fn new(ctx: &'a XdpContext) -> Self {
        Self { ctx }
    }

    /// Address of `len` bytes at `offset`, checked against the buffer's end.
    #[inline(always)]
    fn place(&self, offset: usize, len: usize) -> Result<usize, OutOfBounds> {
        let place = self.ctx.data() + offset;
        if place + len > self.end() { Err(OutOfBounds) } else { Ok(place) }
    }

    /// Read anew each time: from what it knows of the end already, the compiler can prove some
    /// checks needless, but the verifier wants to see each of them.
    #[inline(always)]
    fn end(&self) -> usize {
        // SAFETY: the context outlives the packet; its fields are plain integers.
        unsafe { (&raw const (*self.ctx.ctx).data_end).read_volatile() as usize }
    }
}

impl Packet for XdpPacket<'_> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.ctx.data_end() - self.ctx.data()
    }

    #[inline(always)]
    fn reach(&mut self, _len: usize) -> Result<(), OutOfBounds> {
        Ok(())
    }

    #[inline(always)]
    fn sum(&self, _offset: usize, _len: usize) -> Result<u16, OutOfBounds> {
        Err(OutOfBounds)
    }

    #[inline(always)]
    fn read<T: Plain>(&self, offset: usize) -> Result<T, OutOfBounds> {
        let place = self.place(offset, size_of::<T>())? as *const T;
        // SAFETY: `place` has checked that a whole T lies within the buffer; it holds integers, any bytes are one.
        Ok(unsafe { place.read_unaligned() })
    }

    #[inline(always)]
    fn write<T: Plain>(&mut self, offset: usize, value: T) -> Result<(), OutOfBounds> {
        let place = self.place(offset, size_of::<T>())? as *mut T;
        // SAFETY: as in `read`; the program is the buffer's only user while it runs.
        unsafe { place.write_unaligned(value) };
        Ok(())
    }
}
