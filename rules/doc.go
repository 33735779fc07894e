// Package rules is the rule language: it reads rule files, compiles their
// statements and says which rules fire for a message and what they send.
//
// The statement is the SQL dialect of EMQX rules. It is scanned, parsed and
// compiled to closures once, when files are loaded; a message is then matched on
// its payload text in place, decoding only what a statement reads.
//
// Every mistake in a file is a [Problem] with a position. A set of rules is
// immutable: a reload makes a new [Set] or changes nothing, see [Keeper].
//
// The package knows neither MQTT connections nor HTTP. It hands out bytes to be
// delivered and the destinations that its files define; who stores and sends
// them is the caller's choice.
package rules
