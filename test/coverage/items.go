package main

// item is one item of qcow2.h: what it is, where it lives in drover, and the tests that show that it works.
type item struct {
	name string
	what string
	// code names declarations as folder.Identifier, or folder.Type.Member, separated by blanks.
	code string
	// tests names test functions as "folder TestName" (or "folder TestName/subtest"), separated by semicolons.
	tests string
}

// group is a part of the header.
type group struct {
	title string
	intro string
	items []item
}

// Tests and places that many items share.
const (
	fm      = "qcow2/internal/format."
	mt      = "qcow2/internal/meta."
	fmTests = "qcow2/internal/format "

	damagedHeaders = "test/hostile TestHeaders"
	damagedTables  = "test/hostile TestTables"
	headerBytes    = "test/coverage TestHeaderBytes"
	bothWays       = "test/interop TestReadsWhatQEMUWrote; test/interop TestQEMUReadsWhatDroverWrote"
	everyCluster   = "test/coverage TestEveryClusterSize"
	model          = "qcow2 TestModel"
	overlaps       = "qcow2 TestOverlapSwitches"
	templates      = "qcow2/internal/meta TestTemplates"
	lazy           = "qcow2 TestLazyRefcounts"
	widths         = "test/coverage TestRefcountWidths"
	unknown        = "test/coverage TestUnknownThingsSurvive"
	snapshots      = "internal/cli TestSnapshotLikeQEMU; test/interop TestSnapshotsStayIntact"
	snapshotBytes  = "qcow2/internal/format TestSnapshotRoundTrip; qcow2/internal/format TestParseSnapshotsQEMUMakes"
	stress         = "qcow2 TestConcurrentOwners; test/race TestExplore"
	options        = "qcow2 TestRuntimeOptions"
	everything     = "test/model TestEverything"
	info           = "internal/cli TestInfoLikeQEMU"
)

var groups = []group{
	{"B1 Constants", "", []item{
		{"BDRV_SECTOR_BITS, _SIZE", "sectors of 512 bytes; sizes are rounded to them", fm + "SectorSize " + fm + "Header.DiskSize", "test/coverage TestSizesAreWholeSectors"},
		{"QCOW2_MAGIC", "`QFI\\xfb`, by which the format is known", fm + "Magic qcow2.Probe", damagedHeaders + "; " + headerBytes},
		{"QCOW2_CRYPT_NONE", "no encryption", fm + "CryptNone", damagedHeaders + "; " + bothWays},
		{"QCOW2_CRYPT_AES", "legacy AES-CBC", fm + "CryptAES luks.NewLegacyAES", "luks TestLegacyAES; qcow2 TestEncryptedImagesOfQEMU"},
		{"QCOW2_MAX_CRYPT_CLUSTERS", "bound of the memory of encrypted requests", "luks.SectorCipher", "luks TestXTSAllocatesNothing; qcow2 TestEncryptedModel"},
		{"QCOW2_MAX_SNAPSHOTS", "65536 snapshots", fm + "MaxSnapshots " + fm + "Header.ValidateSnapshotPointer", damagedHeaders + "; " + fmTests + "TestSnapshotLimits"},
		{"QCOW2_MAX_REFTABLE_SIZE", "8 MiB of refcount table", fm + "MaxRefTableBytes " + fm + "Layout.MaxRefTableClusters", damagedHeaders + "; qcow2/internal/meta TestAllocatorStopsAtTheLimit"},
		{"QCOW2_MAX_L1_SIZE", "32 MiB of L1 table", fm + "MaxL1Bytes " + fm + "MaxL1Entries", damagedHeaders + "; test/coverage TestTooBig"},
		{"QCOW2_MAX_SNAPSHOTS_SIZE", "64 MiB of snapshot table", fm + "MaxSnapshotTable", fmTests + "TestSnapshotLimits"},
		{"QCOW2_OFLAG_COPIED", "the refcount is exactly 1", fm + "L2Entry.Copied " + fm + "L1Entry.Copied", model + "; " + everything + "; " + damagedTables},
		{"QCOW2_OFLAG_COMPRESSED", "a compressed cluster", fm + "L2Entry.Compressed " + fm + "Layout.MakeCompressed", everyCluster + "; test/interop TestCompressedImages"},
		{"QCOW2_OFLAG_ZERO", "reads as zeroes; version 3 only", fm + "L2Zero " + fm + "MakeL2ZeroAlloc", fmTests + "TestKind; " + damagedTables},
		{"MIN_CLUSTER_BITS", "512 bytes", fm + "MinClusterBits", everyCluster + "; " + damagedHeaders},
		{"MAX_CLUSTER_BITS", "2 MiB", fm + "MaxClusterBits", everyCluster + "; " + damagedHeaders},
		{"MIN_L2_CACHE_SIZE", "the least that a cache is clamped to", "qcow2.Options.CacheSize qcow2.Options.cacheSizes", "test/coverage TestSmallestCache; qcow2 TestCacheSizes"},
		{"MIN_REFCOUNT_CACHE_SIZE", "the same for refcount blocks", "qcow2.Options.cacheSizes", "qcow2 TestCacheSizes"},
		{"DEFAULT_L2_CACHE_CLUSTERS, _BYTE_SIZE", "default size of the L2 cache", "qcow2.DefaultCacheSize qcow2.Image.CacheSizes", "qcow2 TestCacheSizes; qcow2 TestHugeDisk"},
		{"L2_REFCOUNT_SIZE_RATIO", "how caches shared one size; obsolete in QEMU itself", "qcow2.Options.cacheSizes", "qcow2 TestCacheSizes"},
		{"DEFAULT_CLUSTER_SIZE", "64 KiB", "qcow2.CreateOptions.ClusterSize", headerBytes},
		{"L1E_OFFSET_MASK", "bits 9 to 55", fm + "L1Entry.Offset " + fm + "L1Entry.Reserved", fmTests + "TestEntryFields; " + damagedTables},
		{"L2E_OFFSET_MASK", "bits 9 to 55", fm + "L2Entry.HostOffset " + fm + "L2Entry.Reserved", fmTests + "TestEntryFields; " + damagedTables},
		{"L2E_COMPRESSED_OFFSET_SIZE_MASK", "place and length of a compressed cluster", fm + "Layout.CompressedExtent", fmTests + "TestCompressedTable; " + damagedTables},
		{"REFT_OFFSET_MASK", "bits 9 to 63", fm + "RefTableEntry.Offset " + fm + "RefTableEntry.Reserved", fmTests + "TestEntryFields; " + damagedTables},
	}},
	{"B2 Options", "", []item{
		{"lazy-refcounts", "postpone refcounts, with the dirty bit set", "qcow2.Options.LazyRefcounts", lazy + "; " + options},
		{"pass-discard-request", "the guest's discards reach the host", "qcow2.Options.PassDiscardRequest " + mt + "PassDiscard.Passes", "test/coverage TestPassDiscard; " + options},
		{"pass-discard-snapshot", "so does the space of deleted snapshots", "qcow2.Options.PassDiscardSnapshot " + mt + "PassDiscard.Passes", "test/coverage TestPassDiscard; " + options},
		{"pass-discard-other", "and other space that became free", "qcow2.Options.PassDiscardOther " + mt + "PassDiscard.Passes", "test/coverage TestPassDiscard; " + options},
		{"overlap-check", "which structures are watched", "qcow2.Options.Overlap qcow2.Options.overlapOptions", overlaps + "; " + options},
		{"overlap-check.template", "none, constant, cached or all", mt + "OverlapNone " + mt + "OverlapConstant " + mt + "OverlapCached " + mt + "OverlapAll", templates + "; " + overlaps + "; " + options},
		{"overlap-check.main-header", "", mt + "MainHeader", overlaps},
		{"overlap-check.active-l1", "", mt + "ActiveL1", overlaps},
		{"overlap-check.active-l2", "", mt + "ActiveL2", overlaps},
		{"overlap-check.refcount-table", "", mt + "RefcountTable", overlaps},
		{"overlap-check.refcount-block", "", mt + "RefcountBlock", overlaps},
		{"overlap-check.snapshot-table", "", mt + "SnapshotTable", overlaps},
		{"overlap-check.inactive-l1", "", mt + "InactiveL1", overlaps},
		{"overlap-check.inactive-l2", "", mt + "InactiveL2", overlaps},
		{"cache-size", "bound of all caches; at most two of the three sizes may be given", "qcow2.Options.TotalCacheSize", "qcow2 TestCacheSizes; " + options + "; qcow2 TestRuntimeOptionErrors"},
		{"l2-cache-size", "bound of the L2 cache", "qcow2.Options.CacheSize", "qcow2 TestCacheSizes; test/coverage TestSmallestCache; test/race TestEvictionStorm"},
		{"refcount-cache-size", "bound of the refcount cache", "qcow2.Options.RefcountCacheSize", "qcow2 TestCacheSizes; " + options},
		{"cache-clean-interval", "idle memory is given back", "qcow2.Options.CacheCleanInterval " + mt + "Mapping.Sweep", "qcow2 TestIdleCacheIsDropped; " + options},
	}},
	{"B3 Header fields", "", []item{
		{"magic", "", fm + "OffMagic", damagedHeaders + "; " + headerBytes},
		{"version", "2 and 3", fm + "OffVersion " + fm + "Header.Version", damagedHeaders + "; qcow2 TestAmendVersion"},
		{"backing_file_offset", "", fm + "OffBackingOffset " + fm + "Header.BackingFile", damagedHeaders + "; qcow2 TestChangeBacking"},
		{"backing_file_size", "", fm + "OffBackingSize " + fm + "MaxBackingName", damagedHeaders + "; qcow2 TestChangeBackingNoRoom"},
		{"cluster_bits", "", fm + "OffClusterBits " + fm + "Header.ClusterBits", damagedHeaders + "; " + everyCluster},
		{"size", "", fm + "OffSize " + fm + "Header.Size", damagedHeaders + "; qcow2 TestResize"},
		{"crypt_method", "", fm + "OffCryptMethod " + fm + "Header.CryptMethod", damagedHeaders + "; qcow2 TestEncryptedImagesOfQEMU"},
		{"l1_size", "", fm + "Header.L1Size " + fm + "EncodeL1Pointer", damagedHeaders + "; qcow2 TestResizeLongL1"},
		{"l1_table_offset", "", fm + "OffL1 " + fm + "Header.L1Offset", damagedHeaders + "; qcow2 TestResizeLongL1"},
		{"refcount_table_offset", "", fm + "OffRefTable " + fm + "EncodeRefTablePointer", damagedHeaders + "; qcow2/internal/meta TestMovedRefcountTableIsForgotten"},
		{"refcount_table_clusters", "", fm + "Header.RefTableLen", damagedHeaders + "; test/race TestE1RefcountTableGrows"},
		{"nb_snapshots", "", fm + "OffSnapshots " + fm + "Header.SnapshotCount", damagedHeaders + "; qcow2 TestManySnapshots"},
		{"snapshots_offset", "", fm + "Header.SnapshotsOffset " + fm + "EncodeSnapshotsPointer", damagedHeaders + "; " + snapshots},
		{"incompatible_features", "", fm + "OffIncompat " + fm + "Header.Incompat", damagedHeaders},
		{"compatible_features", "", fm + "OffCompat " + fm + "Header.Compat", damagedHeaders + "; " + unknown},
		{"autoclear_features", "", fm + "OffAutoclear " + fm + "Header.Autoclear", damagedHeaders + "; qcow2 TestBitmapsOfStock"},
		{"refcount_order", "", fm + "OffRefcountOrder " + fm + "Header.RefcountOrder", damagedHeaders + "; " + widths},
		{"header_length", "", fm + "OffHeaderLength " + fm + "Header.UnknownFields", damagedHeaders + "; " + unknown},
	}},
	{"B4 Snapshots", "On the disk, and in memory.", []item{
		{"QCowSnapshotHeader.l1_table_offset", "", fm + "Snapshot.L1Offset", snapshotBytes + "; " + snapshots},
		{"QCowSnapshotHeader.l1_size", "", fm + "Snapshot.L1Size", snapshotBytes + "; " + damagedTables},
		{"QCowSnapshotHeader.id_str_size", "", fm + "Snapshot.ID", snapshotBytes + "; " + damagedTables},
		{"QCowSnapshotHeader.name_size", "up to 65535 bytes", fm + "Snapshot.Name", "test/coverage TestLongSnapshotName; " + damagedTables},
		{"QCowSnapshotHeader.date_sec", "", fm + "Snapshot.DateSec", snapshotBytes + "; " + snapshots},
		{"QCowSnapshotHeader.date_nsec", "", fm + "Snapshot.DateNsec", snapshotBytes},
		{"QCowSnapshotHeader.vm_clock_nsec", "", fm + "Snapshot.VMClockNsec", snapshotBytes},
		{"QCowSnapshotHeader.vm_state_size", "32 bits", fm + "Snapshot.vmStateSize32", snapshotBytes},
		{"QCowSnapshotHeader.extra_data_size", "", fm + "Snapshot.ExtraSize", snapshotBytes + "; " + fmTests + "TestOldSnapshots"},
		{"QCowSnapshotExtraData.vm_state_size_large", "64 bits", fm + "Snapshot.VMStateSize", snapshotBytes + "; " + damagedTables},
		{"QCowSnapshotExtraData.disk_size", "", fm + "Snapshot.DiskSize", "qcow2 TestResizeWithSnapshots; " + snapshotBytes},
		{"QCowSnapshot.l1_table_offset", "", "qcow2.Image.OpenSnapshot", "test/nbd TestSnapshotExports"},
		{"QCowSnapshot.l1_size", "", "qcow2.Image.OpenSnapshot", "test/nbd TestSnapshotExports"},
		{"QCowSnapshot.id_str", "one more than the largest", "qcow2.Snapshot qcow2.newSnapshotID", snapshots},
		{"QCowSnapshot.name", "", "qcow2.Snapshot qcow2.Image.RenameSnapshot", snapshots + "; test/coverage TestLongSnapshotName"},
		{"QCowSnapshot.disk_size", "", "qcow2.SnapshotInfo.DiskSize", "qcow2 TestResizeWithSnapshots"},
		{"QCowSnapshot.vm_state_size", "", "qcow2.SnapshotInfo.VMStateSize", "test/coverage TestVMStateIsKept"},
		{"QCowSnapshot.date_sec, date_nsec", "", "qcow2.SnapshotInfo.Date", snapshots},
		{"QCowSnapshot.vm_clock_nsec", "", "qcow2.SnapshotInfo.VMClockNsec", "test/coverage TestVMStateIsKept"},
	}},
	{"B5 Extensions and features", "", []item{
		{"Qcow2UnknownHeaderExtension.magic", "", fm + "Extension.Type", unknown},
		{"Qcow2UnknownHeaderExtension.len", "", fm + "Extension.Data", unknown},
		{"Qcow2UnknownHeaderExtension.data", "kept through every rewrite", fm + "Header.UnknownExtensions", unknown},
		{"QCOW2_FEAT_TYPE_INCOMPATIBLE", "", fm + "FeatureIncompatible", fmTests + "TestUnsupportedError; " + headerBytes},
		{"QCOW2_FEAT_TYPE_COMPATIBLE", "", fm + "FeatureCompatible", headerBytes},
		{"QCOW2_FEAT_TYPE_AUTOCLEAR", "", fm + "FeatureAutoclear", headerBytes},
		{"QCOW2_INCOMPAT_DIRTY_BITNR", "bit 0", fm + "IncompatDirty", damagedHeaders},
		{"QCOW2_INCOMPAT_DIRTY", "cleared by a verified repair or a clean close only", mt + "Store.MarkDirty " + mt + "Store.CloseClean", lazy + "; qcow2 TestHalfDoneStaysDirty"},
		{"QCOW2_INCOMPAT_CORRUPT_BITNR", "bit 1", fm + "IncompatCorrupt", damagedHeaders},
		{"QCOW2_INCOMPAT_CORRUPT", "read only until repaired", "qcow2.Image.refuse", "qcow2 TestCorruptBit; " + damagedHeaders},
		{"QCOW2_INCOMPAT_MASK", "what is known: bits 0 to 4 today", fm + "IncompatKnown", damagedHeaders},
		{"QCOW2_COMPAT_LAZY_REFCOUNTS_BITNR", "bit 0", fm + "CompatLazyRefcounts", damagedHeaders},
		{"QCOW2_COMPAT_LAZY_REFCOUNTS", "", "qcow2.AmendOptions", "internal/cli TestAmendLikeQEMU"},
		{"QCOW2_COMPAT_FEAT_MASK", "unknown bits are kept", fm + "Header.Compat", unknown},
		{"Qcow2Feature.type", "", fm + "FeatureName.Set", headerBytes},
		{"Qcow2Feature.bit", "", fm + "FeatureName.Bit", headerBytes},
		{"Qcow2Feature.name", "46 bytes, shown in errors", fm + "FeatureName.Name", headerBytes + "; " + fmTests + "TestNameOfUnknownFeatureIsPrintable"},
	}},
	{"B6 Discard", "", []item{
		{"QCOW2_DISCARD_NEVER", "replaced by copy-on-write: the policy of 'other' decides", mt + "Cause", "test/coverage TestPassDiscard"},
		{"QCOW2_DISCARD_ALWAYS", "cut off, or repaired away", "qcow2.Image.shrink", "qcow2 TestShrinkGivesSpaceBack; " + everything},
		{"QCOW2_DISCARD_REQUEST", "", mt + "PassDiscard", "test/coverage TestPassDiscard"},
		{"QCOW2_DISCARD_SNAPSHOT", "", mt + "PassDiscard", "test/coverage TestPassDiscard"},
		{"QCOW2_DISCARD_OTHER", "", mt + "PassDiscard", "test/coverage TestPassDiscard"},
		{"QCOW2_DISCARD_MAX", "number of causes", mt + "Cause", "test/coverage TestPassDiscard"},
		{"Qcow2DiscardRegion.bs", "the file", mt + "Store", model},
		{"Qcow2DiscardRegion.offset", "", mt + "ClusterRun.First", stress},
		{"Qcow2DiscardRegion.bytes", "merged; not reused before it is done", mt + "Store.reclaim", stress + "; test/race TestCloudHypervisor8624"},
	}},
	{"B7 Refcounts and the state of an open image", "", []item{
		{"Qcow2GetRefcountFunc, get_refcount", "widths of 1 to 64 bits", fm + "Layout.Refcount", fmTests + "TestRefcountPacking; " + widths},
		{"Qcow2SetRefcountFunc, set_refcount", "", fm + "Layout.SetRefcount", fmTests + "TestRefcountPacking; " + widths},
		{"cluster_bits", "", fm + "Layout.ClusterBits", fmTests + "TestGeometry; " + everyCluster},
		{"cluster_size", "", fm + "Layout.ClusterSize", fmTests + "TestGeometry; " + everyCluster},
		{"cluster_sectors", "", fm + "Layout.ClusterSize", fmTests + "TestGeometry"},
		{"l2_bits", "", fm + "Layout.l2Bits", fmTests + "TestGeometry"},
		{"l2_size", "", fm + "Layout.L2Entries", fmTests + "TestGeometry"},
		{"l1_size", "", fm + "Layout.L1EntriesFor", fmTests + "TestGeometry; qcow2 TestResizeLongL1"},
		{"l1_vm_state_index", "the first L1 entry behind the disk", fm + "Layout.L1EntriesFor", "test/coverage TestVMStateIsKept"},
		{"refcount_block_bits", "", fm + "Layout.refBlockBits", fmTests + "TestRefcountPacking"},
		{"refcount_block_size", "", fm + "Layout.RefcountsPerBlock", fmTests + "TestGeometry"},
		{"csize_shift", "70 - cluster_bits today", fm + "Layout.compressedShift", fmTests + "TestCompressedTable; " + everyCluster},
		{"csize_mask", "", fm + "Layout.CompressedExtent", fmTests + "TestCompressedTable; " + everyCluster},
		{"cluster_offset_mask", "", fm + "Layout.MaxCompressedOffset", fmTests + "TestCompressedTable; " + everyCluster},
		{"l1_table_offset", "", mt + "Config.L1Off", model},
		{"l1_table", "", mt + "Mapping", model},
		{"l2_table_cache", "looked up without a lock", mt + "Mapping.Lookup", "qcow2/internal/meta TestLookupDoesNotAllocate; test/race TestEvictionStorm"},
		{"refcount_block_cache", "", mt + "Refcounts.Get", "test/race TestE1RefcountTableGrows"},
		{"cache_clean_timer, cache_clean_interval", "", "qcow2.Options.CacheCleanInterval", "qcow2 TestIdleCacheIsDropped"},
		{"cluster_cache", "decompressed clusters", "qcow2.clusterCache", "test/race TestL1CompressedClusterIsReadOnce"},
		{"cluster_data", "", "qcow2.Image.decompress", "test/interop TestCompressedImages"},
		{"cluster_cache_offset", "", "qcow2.clusterCache.read", "test/race TestL1CompressedClusterIsReadOnce"},
		{"refcount_table", "", mt + "Refcounts", "test/race TestE1RefcountTableGrows"},
		{"refcount_table_offset", "", mt + "Config.RefTableOff", "qcow2/internal/meta TestMovedRefcountTableIsForgotten"},
		{"refcount_table_size", "", mt + "Config.RefTableLen", "test/race TestE1RefcountTableGrows"},
		{"free_cluster_index", "the allocator", mt + "Refcounts.Alloc", "qcow2/internal/meta TestAllocatorNeverHandsOutTwice; qcow2/internal/meta TestAllocatorReusesHoles"},
		{"free_byte_offset", "compressed clusters share host clusters", mt + "Store.Pack", everyCluster},
		{"snapshots_offset", "", mt + "Config.SnapshotsOff", snapshots},
		{"snapshots_size", "", mt + "Config.SnapshotsSize", "qcow2 TestManySnapshots"},
		{"nb_snapshots", "", "qcow2.Image.Snapshots", "qcow2 TestManySnapshots"},
		{"snapshots", "", "qcow2.Image.Snapshots", snapshots},
		{"flags", "how the image was opened", "qcow2.Options.ReadOnly", "test/interop TestDroverReaderKeepsQEMUFromWriting"},
		{"qcow_version", "", "qcow2.Info.Version", info},
		{"use_lazy_refcounts", "", "qcow2.Image.lazy", lazy},
		{"refcount_order", "", fm + "Layout.RefcountOrder", widths},
		{"refcount_bits", "", fm + "Layout.RefcountBits", info + "; " + widths},
		{"refcount_max", "", fm + "Layout.RefcountMax", "qcow2 TestSnapshotOverflow"},
		{"discard_passthrough", "", "qcow2.Options.passDiscard", "test/coverage TestPassDiscard"},
		{"overlap_check", "", "qcow2.Options.watched", overlaps},
		{"signaled_corruption", "one refusal, and the image goes on", mt + "CorruptError", "qcow2 TestCorruptBit; qcow2 TestTablesInWrongPlaces"},
		{"incompatible_features", "", fm + "Header.Incompat", damagedHeaders},
		{"compatible_features", "", fm + "Header.Compat", unknown},
		{"autoclear_features", "unknown ones are cleared before the first write", "qcow2.Image.startJournal", "test/coverage TestUnknownAutoclear"},
		{"unknown_header_fields_size", "", fm + "Header.UnknownFields", unknown},
		{"unknown_header_fields", "kept through every rewrite", fm + "Header.UnknownFields", unknown},
		{"unknown_header_ext", "", fm + "Header.UnknownExtensions", unknown},
		{"discards", "what is to be given back", mt + "Store.reclaim", stress},
		{"cache_discards", "batched per flush", mt + "Store.reclaimMarked", "test/coverage TestPassDiscard"},
		{"image_backing_file", "as stored", "qcow2.Info.BackingFile", info},
		{"image_backing_format", "as stored", "qcow2.Info.BackingFormat", info},
	}},
	{"B8 The write path", "", []item{
		{"Qcow2COWRegion.offset", "head and tail of a partial write", "qcow2.allocation.copyOld", "test/coverage TestSectorIntoBackedCluster; " + model},
		{"Qcow2COWRegion.nb_sectors", "to the byte", "qcow2.allocation.copyOld", "test/coverage TestSectorIntoBackedCluster; " + model},
		{"QCowL2Meta.offset", "", "qcow2.allocation", stress},
		{"QCowL2Meta.alloc_offset", "", "qcow2.allocation", stress},
		{"QCowL2Meta.nb_available", "", "qcow2.allocation", stress},
		{"QCowL2Meta.nb_clusters", "", "qcow2.allocation.plan", stress},
		{"QCowL2Meta.cow_start", "", "qcow2.allocation.copyOld", "test/race TestWritersOfOneCluster; " + model},
		{"QCowL2Meta.cow_end", "", "qcow2.allocation.copyOld", "test/race TestWritersOfOneCluster; " + model},
		{"QCowL2Meta.next", "a request is split at its runs", "qcow2.Image.changeMapping", model},
		{"QCowL2Meta.dependent_requests", "writers of one cluster wait for one another", mt + "Ranges.Lock", "test/race TestWritersOfOneCluster; qcow2/internal/meta TestRangesExclude"},
		{"QCowL2Meta.next_in_flight", "", mt + "Ranges", "qcow2/internal/meta TestRangesExclude"},
		{"cluster_allocs", "", mt + "Ranges", stress},
		{"lock", "none over the whole image", mt + "Epochs", stress},
		{"cipher", "", "luks.SectorCipher", "luks TestModesAgreeWithTheirDefinitions; luks/ciphers TestQEMUReadsWhatIsCreatedHere; qcow2 TestEncryptedImagesOfQEMU"},
		{"crypt_method_header", "", fm + "Header.CryptMethod", "qcow2 TestHostileCryptoExtension; " + damagedHeaders},
		{"QCOW2_CLUSTER_UNALLOCATED", "", fm + "KindUnallocated", fmTests + "TestKind; internal/cli TestMapLikeQEMU"},
		{"QCOW2_CLUSTER_NORMAL", "", fm + "KindNormal", fmTests + "TestKind; internal/cli TestMapLikeQEMU"},
		{"QCOW2_CLUSTER_COMPRESSED", "", fm + "KindCompressed", fmTests + "TestKind; internal/cli TestMapLikeQEMU"},
		{"QCOW2_CLUSTER_ZERO", "with and without a host cluster", fm + "KindZeroPlain " + fm + "KindZeroAlloc", fmTests + "TestKind; internal/cli TestMapLikeQEMU"},
		{"QCowAIOCB", "a request is a call", "qcow2.Image.WriteAt", model},
		{"BlockDriverState", "a node of the chain", "block.Device", "qcow2 TestDeviceContract"},
		{"Qcow2Cache", "", mt + "Mapping", "test/race TestEvictionStorm"},
	}},
	{"B9 Overlap checks and helpers", "", []item{
		{"QCOW2_OL_MAIN_HEADER_BITNR, QCOW2_OL_MAIN_HEADER", "", mt + "MainHeader", overlaps + "; " + templates},
		{"QCOW2_OL_ACTIVE_L1_BITNR, QCOW2_OL_ACTIVE_L1", "", mt + "ActiveL1", overlaps + "; " + templates},
		{"QCOW2_OL_ACTIVE_L2_BITNR, QCOW2_OL_ACTIVE_L2", "", mt + "ActiveL2", overlaps + "; " + templates},
		{"QCOW2_OL_REFCOUNT_TABLE_BITNR, QCOW2_OL_REFCOUNT_TABLE", "", mt + "RefcountTable", overlaps + "; " + templates},
		{"QCOW2_OL_REFCOUNT_BLOCK_BITNR, QCOW2_OL_REFCOUNT_BLOCK", "", mt + "RefcountBlock", overlaps + "; " + templates},
		{"QCOW2_OL_SNAPSHOT_TABLE_BITNR, QCOW2_OL_SNAPSHOT_TABLE", "", mt + "SnapshotTable", overlaps + "; " + templates},
		{"QCOW2_OL_INACTIVE_L1_BITNR, QCOW2_OL_INACTIVE_L1", "", mt + "InactiveL1", overlaps + "; " + templates},
		{"QCOW2_OL_INACTIVE_L2_BITNR, QCOW2_OL_INACTIVE_L2", "", mt + "InactiveL2", overlaps + "; " + templates},
		{"QCOW2_OL_MAX_BITNR", "nine today, with the bitmap directory", mt + "BitmapDirectory", overlaps + "; " + templates},
		{"QCOW2_OL_NONE", "", mt + "OverlapNone", templates},
		{"QCOW2_OL_CONSTANT", "", mt + "OverlapConstant", templates},
		{"QCOW2_OL_CACHED", "", mt + "OverlapCached", templates},
		{"QCOW2_OL_ALL", "", mt + "OverlapAll", templates},
		{"start_of_cluster", "", fm + "Layout.ClusterStart", fmTests + "TestGeometry"},
		{"offset_into_cluster", "", fm + "Layout.InCluster", fmTests + "TestGeometry"},
		{"size_to_clusters", "without overflow", fm + "Layout.ClustersFor", fmTests + "TestGeometry"},
		{"size_to_l1", "without overflow near 2^63", fm + "Layout.l1EntriesNeeded", "test/coverage TestTooBig; " + fmTests + "TestCapacity"},
		{"offset_to_l2_index", "", fm + "Layout.L2Index " + fm + "Layout.L1Index", fmTests + "TestGuestOffsetIsInverse"},
		{"align_offset", "", fm + "roundUp8", fmTests + "TestHeaderRoundTrip"},
		{"qcow2_vm_state_offset", "the first byte behind the disk that L1 entries map", fm + "Layout.L1EntriesFor", "test/coverage TestVMStateIsKept"},
		{"qcow2_max_refcount_clusters", "", fm + "Layout.MaxRefTableClusters", damagedHeaders},
		{"qcow2_get_cluster_type", "", fm + "Layout.Kind " + fm + "Layout.SubKind", fmTests + "TestKind; " + fmTests + "TestSubclusters"},
		{"qcow2_need_accurate_refcounts", "unless the dirty bit is set", "qcow2.Image.lazy", lazy},
		{"l2meta_cow_start", "", "qcow2.allocation.bound", model},
		{"l2meta_cow_end", "", "qcow2.allocation.bound", model},
		{"refcount_diff", "", fm + "Layout.RefcountMax", "qcow2 TestSnapshotOverflow"},
	}},
}
