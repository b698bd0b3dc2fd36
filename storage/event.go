package storage

// Event is something that an image format is about to do to the file below it. A file that wants to know, to make it fail
// or to hold it up, is an Eventer; others are not told.
type Event uint8

// The events, by QEMU's names. EventNone is what happens when a file is opened.
const (
	EventNone Event = iota
	EventL1Update
	EventL1GrowAllocTable
	EventL1GrowWriteTable
	EventL1GrowActivateTable
	EventL2Load
	EventL2Update
	EventL2UpdateCompressed
	EventL2AllocCOWRead
	EventL2AllocWrite
	EventReadAIO
	EventReadBackingAIO
	EventReadCompressed
	EventWriteAIO
	EventWriteCompressed
	EventVMStateLoad
	EventVMStateSave
	EventCOWRead
	EventCOWWrite
	EventRefTableLoad
	EventRefTableGrow
	EventRefTableUpdate
	EventRefBlockLoad
	EventRefBlockUpdate
	EventRefBlockUpdatePart
	EventRefBlockAlloc
	EventRefBlockAllocHookup
	EventRefBlockAllocWrite
	EventRefBlockAllocWriteBlocks
	EventRefBlockAllocWriteTable
	EventRefBlockAllocSwitchTable
	EventClusterAlloc
	EventClusterAllocBytes
	EventClusterFree
	EventFlushToOS
	EventFlushToDisk
	EventPwritevRMWHead
	EventPwritevRMWAfterHead
	EventPwritevRMWTail
	EventPwritevRMWAfterTail
	EventPwritev
	EventPwritevZero
	EventPwritevDone
	EventEmptyImagePrepare
	EventL1ShrinkWriteTable
	EventL1ShrinkFreeL2Clusters
	EventCORWrite
	EventClusterAllocSpace

	eventCount
)

var eventNames = [eventCount]string{
	"none", "l1_update", "l1_grow_alloc_table", "l1_grow_write_table", "l1_grow_activate_table", "l2_load", "l2_update",
	"l2_update_compressed", "l2_alloc_cow_read", "l2_alloc_write", "read_aio", "read_backing_aio", "read_compressed", "write_aio",
	"write_compressed", "vmstate_load", "vmstate_save", "cow_read", "cow_write", "reftable_load", "reftable_grow",
	"reftable_update", "refblock_load", "refblock_update", "refblock_update_part", "refblock_alloc", "refblock_alloc_hookup",
	"refblock_alloc_write", "refblock_alloc_write_blocks", "refblock_alloc_write_table", "refblock_alloc_switch_table",
	"cluster_alloc", "cluster_alloc_bytes", "cluster_free", "flush_to_os", "flush_to_disk", "pwritev_rmw_head",
	"pwritev_rmw_after_head", "pwritev_rmw_tail", "pwritev_rmw_after_tail", "pwritev", "pwritev_zero", "pwritev_done",
	"empty_image_prepare", "l1_shrink_write_table", "l1_shrink_free_l2_clusters", "cor_write", "cluster_alloc_space",
}

// String returns QEMU's name of the event.
func (e Event) String() string {
	if e >= eventCount {
		return "unknown event"
	}
	return eventNames[e]
}

// ParseEvent returns the event of a name.
func ParseEvent(name string) (Event, bool) {
	for e, n := range eventNames {
		if n == name {
			return Event(e), true
		}
	}
	return 0, false
}

// Eventer is implemented by a File that wants to know what is about to happen to it.
type Eventer interface {
	// Event is called before what it names. It may wait.
	Event(e Event)
}

// Tell tells f of an event if it wants to know.
func Tell(f File, e Event) {
	if w, ok := f.(Eventer); ok {
		w.Event(e)
	}
}
